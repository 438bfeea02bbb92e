import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from eval import comparison_page
from eval.comparison_page import render
from eval.quoted import RULES, Quoted, lookup
from tests.fabricate import HOSTILE
from tests.fabricate_comparison import ARMS, fabricate
from tests.test_report import FORBIDDEN, Page, shows

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
# numbers of the prose itself: level of the intervals and of the p-value, name of the hash
CONSTANTS = {"95", "0.05", "256"}
NUMBER = re.compile(r"(?<![A-Za-z\d.])\d[\d,]*(?:\.\d+)*(?:e-?\d+)?")


class Numbers(HTMLParser):
    """``<data>`` elements as (path, rule, value, text), and the visible text; not that of commands, of the captions of pairs,
    and of the list of all fields.
    """

    SILENT = {"pre", "style", "script", "title"}

    def __init__(self, source: str):
        super().__init__()
        self.quoted, self.prose, self.all_text, self.open, self.at = [], [], [], [], None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag == "data":
            self.at = [named["data-path"], named["data-rule"], named["value"], ""]
        if tag not in ("img", "meta", "br", "source"):
            self.open.append(
                "silent" if tag in self.SILENT or named.get("class") in ("evidence", "keys fields") else tag
            )

    def handle_endtag(self, tag):
        self.open.pop()
        if tag == "data":
            self.quoted.append(self.at)
            self.at = None

    def handle_data(self, text):
        if "silent" in self.open:
            return
        self.all_text.append(text)
        if self.at:
            self.at[3] += text
        else:
            self.prose.append(text)


def make(folder: Path, *, restricted=False, change=None, images=True, figures=False, **options):
    """A comparison, its training pictures and its page; drawing takes the most time, and few tests need it."""
    comparison, pictures = fabricate(folder / "phantom", **options)
    if change:
        change(comparison)
    nothing = dict.fromkeys(("weights", "outputs", "trajectories", "verified", "metric", "trend"))
    nothing |= {"copies": [None] * len(comparison["arms"])}
    undrawn = mock.patch.object(comparison_page, "_figures", return_value=nothing)
    with nullcontext() if figures else undrawn:
        render(folder / "phantom", comparison, restricted=restricted, images=pictures.image if images else None)
    return comparison, pictures, Page(folder / "phantom" / "comparison.html")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return make(tmp_path_factory.mktemp("opened"), figures=True)


def at(tree, path: str):
    """The value at a path, found by trying every way to split it: slower than `lookup`, and written without it."""
    if path == "":
        yield tree
    parts = path.split(".")
    for size in range(1, len(parts) + 1):
        key, rest = ".".join(parts[:size]), ".".join(parts[size:])
        if isinstance(tree, dict) and key in tree:
            yield from at(tree[key], rest)
        elif isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            yield from at(tree[int(key)], rest)


def body_of_the_table(source: str) -> list[str]:
    """Names of the arms in the order of the table's rows."""
    rows = re.search(r"<tbody.*?</tbody>", source, re.DOTALL).group()
    return [html.unescape(name) for name in re.findall(r'<th role="rowheader"[^>]*data-sort="([^"]*)"', rows)]


def test_one_file_with_one_hashed_script(opened):
    _, _, page = opened
    assert len(page.source) < 4_000_000 and page.tags.count("script") == 1
    assert not {"iframe", "link", "object", "base", "form", "a"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href"):
            assert value.startswith("data:image/")
    script = re.search(r"<script>(.*?)</script>", page.source, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy.startswith(
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assert "http://" not in page.source and "https://" not in page.source and "@import" not in page.source


def test_sections_in_order(opened):
    _, _, page = opened
    ids = re.findall(r'<section[^>]*id="([a-z-]+)"', page.source)
    order = ["verdict", "table", "plane", "along", "copies", "trend", "findings", "evidence", "samples", "reproduce"]
    assert ids == [*order, "not-measured", "reading"]
    assert not FORBIDDEN.search(page.visible)


def check_paths(comparison, source: str) -> int:
    """Every marked number is the one at its path, written by its rule; returns how many there are."""
    quoted = Numbers(source).quoted
    for path, rule, value, text in quoted:
        found = list(at(comparison, path))
        assert len(found) == 1 and str(found[0]) == value and RULES[rule](found[0]) == text
    return len(quoted)


def check_prose(comparison, source: str) -> None:
    """The rest of the text quotes strings of the JSON, and has no other digits."""
    strings = {token for leaf in _leaves(comparison) for token in NUMBER.findall(str(leaf))} | CONSTANTS
    assert set(NUMBER.findall(" ".join(Numbers(source).prose))) <= strings


def check_rounding(comparison, source: str) -> None:
    """Without the paths: each number in the visible text is a value of comparison.json at the precision it is shown with."""
    text = " ".join(Numbers(source).all_text).replace("\N{NARROW NO-BREAK SPACE}", " ")
    strings, values = [], []
    for leaf in _leaves(comparison):
        (values if isinstance(leaf, int | float) else strings).append(leaf)
    allowed = {token for leaf in strings for token in NUMBER.findall(leaf)} | CONSTANTS
    values = np.array(values, dtype=float)
    minutes = values // 60
    known = [values, 100 * values, minutes, values - 60 * minutes, minutes // 60, minutes % 60, values / 2**30]
    known = np.abs(np.concatenate(known))
    for token in set(NUMBER.findall(text)) - allowed:
        mantissa, _, exponent = token.replace(",", "").partition("e")
        last_place = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        nearest = np.abs(known - float(token.replace(",", ""))).min()
        assert nearest <= 0.51 * last_place, f"{token} is not in comparison.json"


def test_every_number_is_in_the_json(opened):
    comparison, _, page = opened
    assert check_paths(comparison, page.source) > 400
    check_prose(comparison, page.source)
    check_rounding(comparison, page.source)
    tops = {path.split(".")[0] for path, *_ in Numbers(page.source).quoted}
    assert tops == {"arms", "design", "comparison", "trend"}


@pytest.mark.parametrize("check", [check_prose, check_rounding])
def test_a_number_that_is_made_up_is_noticed(opened, check):
    comparison, _, page = opened
    with pytest.raises(AssertionError):
        check(comparison, page.source.replace("What it cost", "What it cost: 31.4159"))


def test_the_page_of_an_assembled_comparison(tmp_path):
    fixture, assemble = pytest.importorskip("tests.comparisons"), pytest.importorskip("eval.comparison").assemble
    arms, keywords = fixture.write_comparison(tmp_path)
    comparison = assemble(arms, **keywords)
    render(tmp_path, comparison, restricted=False, images=lambda _: fixture.picture(1))
    page = Page(tmp_path / "comparison.html")
    assert check_paths(comparison, page.source) > 150
    check_prose(comparison, page.source)
    check_rounding(comparison, page.source)
    assert body_of_the_table(page.source) == [arm.name for arm in arms]


def test_all_fields_are_listed(opened):
    comparison, _, page = opened
    table = page.source[page.source.index('<table class="keys fields">') :]
    cells = [html.unescape(text) for text in re.findall(r'<tr><th scope="row">.*?</th><td>(.*?)</td></tr>', table)]
    listed = [leaf for cell in cells for leaf in _leaves([json.loads(cell)])]
    expected = [leaf for leaf in _leaves(comparison) if not isinstance(leaf, str)]
    assert [leaf for leaf in listed if not isinstance(leaf, str)] == expected and len(expected) > 800


def test_a_changed_number_is_noticed(opened):
    comparison, _, page = opened
    changed = json.loads(json.dumps(comparison))
    changed["arms"][1]["summary"]["utility.kid"]["mean"] = 0.0137
    path, rule, _, text = next(
        row for row in Numbers(page.source).quoted if row[0] == "arms.1.summary.utility.kid.mean"
    )
    assert RULES[rule](next(at(changed, path))) != text


def test_lookup_of_keys_with_dots():
    tree = {"a": {"b.c": [{"d": 1}], "b": {"c": 2}}, "a.b": 3}
    assert lookup(tree, "a.b") == 3 and lookup(tree["a"], "b.c.0.d") == 1 and lookup(tree, "") is tree
    for missing in ("x", "a.x", "a.b.c.9", "a.b.c.0.d.e"):
        assert lookup(tree["a"], missing) is None
    assert Quoted({"a<": 1.5})("a<") == '<data value="1.5" data-path="a&lt;" data-rule="number">1.5</data>'
    assert Quoted({"a": None})("a") == "not measured"


def test_verdict_says_who_leaks_and_who_is_not_ranked(opened):
    _, _, page = opened
    verdict = re.search(r'<section class="verdict leak".*?</section>', page.source, re.DOTALL).group()
    parts = dict(re.findall(r"<h3>(.*?)</h3>(.*?)(?=<h3>|</section>)", verdict, re.DOTALL))
    named = {title: set(re.findall(r"<li><b>(.*?)</b>", text)) for title, text in parts.items()}
    assert named["These give training pictures away"] == {"none", "dedup", "augment", "early_stop"}
    assert named["Hits that the control does not tell from chance"] == {"dedup+augment", "output_filter"}
    assert named["From these, this attack extracted nothing"] == {"dpsgd-eps8"}
    assert named["Not measured"] == {"gan"}
    below = next(names for title, names in named.items() if title.startswith("Not comparable"))
    assert below == {"dpsgd-eps1"}
    assert "The filter protects the outputs, not the weights." in page.visible
    assert re.search(r"weights give away: seed 0 : 8 ; seed 1 : 7 \.", page.visible)


@pytest.mark.parametrize(
    ("hits", "level"),
    [(0, "none"), (1, "unclear"), (3, "leak")],
)
def test_verdict_of_a_comparison_without_leaks(tmp_path, hits, level):
    def change(comparison):
        for run in (run for arm in comparison["arms"] for run in arm["runs"] if run["values"]):
            run["values"]["privacy.extraction.verified"] = hits
            run["values"]["privacy.extraction.control.p_value"] = {0: 1.0, 1: 0.4, 3: 0.04}[hits]
            run["guard_off"] = run["guard_off"] and run["guard_off"] | {"verified": hits}

    _, _, page = make(tmp_path, change=change)
    assert f'<section class="verdict {level}"' in page.source and not FORBIDDEN.search(page.visible)


def test_a_filter_does_not_hide_the_leak_of_its_weights(tmp_path):
    """A comparison in which only the guarded arm was measured: its weights count in the title."""

    def change(comparison):
        for arm in comparison["arms"]:
            for run in arm["runs"]:
                if run["values"]:
                    run["values"]["privacy.extraction.verified"] = 0
                if run["guard_off"]:
                    run["guard_off"] |= {"verified": 8, "p_value": 0.001}

    assert '<section class="verdict leak"' in make(tmp_path, change=change)[2].source


def test_a_broken_guarantee_is_not_shown_as_one(tmp_path):
    def change(comparison):
        comparison["arms"][4]["claims"][0]["not_private"] = ["the noise was seeded"]

    _, _, page = make(tmp_path, change=change)
    assert "NOT PRIVATE" in page.visible and "the noise was seeded" in page.visible
    assert 'data-path="arms.4.claims.0.epsilon"' not in page.source


def test_pairs_and_the_same_samples_for_every_arm(opened):
    _, pictures, page = opened
    assert sum(shows(page, pictures.training[:8])) == 6  # of eight that came back, the closest
    assert set(pictures.asked) and page.source.count('alt="generation of ') == 8 * 36
    assert "Arms that share" in page.visible


def test_a_withheld_image_leaves_its_place_empty(tmp_path):
    comparison, pictures, _ = make(tmp_path, images=False)
    (tmp_path / "phantom" / "none-s0" / "eval" / "output_filter" / "generations" / "000007.png").unlink()
    render(tmp_path / "phantom", comparison, restricted=False, images=pictures.image, pairs=0, grid=9)
    source = (tmp_path / "phantom" / "comparison.html").read_text()
    assert source.count("no image") == 1 and source.count('alt="generation of ') == 8 * 9 - 1
    assert not pictures.asked


def test_restricted_shows_no_picture_no_record_and_no_command(tmp_path):
    def change(comparison):
        comparison["comparison"]["config"]["data"] = {"source": "folder/of/patients"}
        for run in (run for arm in comparison["arms"] for run in arm["runs"]):
            run["command"] += " data.source=folder/of/patients"
            run["error"] = run["error"] and "folder/of/patients/smith.png cannot be read"
        comparison["not_measured"] += ["Arm gan, seed 0: failed (folder/of/patients/smith.png cannot be read)."]

    comparison, pictures, page = make(tmp_path, restricted=True, change=change)
    assert pictures.asked == [] and page.pictures() == []
    assert not re.search(r"rec\d{3}", page.source) and "folder/of/patients" not in page.source
    assert "accelerate launch" not in page.source and "restricted" in page.visible
    assert len(body_of_the_table(page.source)) == len(ARMS)  # the numbers stay


def test_hostile_names_are_text(tmp_path):
    def change(comparison):
        comparison["comparison"] |= {"name": HOSTILE, "command": HOSTILE}
        comparison["trend"]["levels"] = [HOSTILE, "$x^2$", "b"]
        comparison["arms"][1] |= {"name": HOSTILE, "level": HOSTILE}
        comparison["arms"][2] |= {"name": "$\\frac{a}{", "why": HOSTILE, "comparable": False}
        comparison["arms"][6]["runs"][0]["findings"][0] |= {"rule": HOSTILE, HOSTILE: HOSTILE}
        comparison["arms"][8]["runs"][0]["error"] = HOSTILE
        comparison["not_measured"].append(HOSTILE)
        for front in comparison["fronts"].values():
            front["front"] = [HOSTILE if name == "dedup" else name for name in front["front"]]
            for point in front["points"]:
                point["arm"] = {"dedup": HOSTILE, "augment": "$\\frac{a}{"}.get(point["arm"], point["arm"])

    for restricted in (False, True):
        _, _, page = make(tmp_path / str(restricted), restricted=restricted, change=change, figures=not restricted)
        assert page.tags.count("script") == 1 and page.visible.count(HOSTILE) > 8
        for uri in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", page.source):
            assert "<script" not in base64.b64decode(uri).decode()


def test_little_is_known(tmp_path):
    """One arm, one failed run, nothing measured; no pictures and no trend."""

    def change(comparison):
        comparison["arms"] = comparison["arms"][-1:]
        comparison["design"] |= {key: None for key in ("generations", "tier", "sampler", "steps", "features", "unit")}
        comparison["design"] |= {"reference": "gan", "utility": {"metric": "kid", "at_most": None}}
        comparison["arms"][0] |= {"kind": None, "protects": None, "claims": [], "matched": None}
        comparison["fronts"] = {
            stage: {"x": "kid", "y": "verified", "front": [], "points": []} for stage in comparison["fronts"]
        }
        comparison["not_measured"] = []

    _, _, page = make(tmp_path, change=change, images=False, trend=False, figures=True)
    assert "No arm was measured" in page.visible and "all arms are ranked" in page.visible


def test_no_control(tmp_path):
    def change(comparison):
        for arm in comparison["arms"]:
            for run in arm["runs"]:
                for key in [key for key in run["values"] or {} if ".control." in key]:
                    del run["values"][key]
            for key in [key for key in arm["summary"] if ".control." in key]:
                del arm["summary"][key]

    _, _, page = make(tmp_path, change=change)
    assert "no control" in page.visible and '<section class="verdict unclear"' in page.source


def test_a_failed_page_leaves_no_file(tmp_path):
    comparison, _ = fabricate(tmp_path / "phantom")
    with pytest.raises(KeyError):
        render(tmp_path / "phantom", comparison, restricted=False, images={}.__getitem__)
    assert not list((tmp_path / "phantom").glob("*comparison.html*"))


def browse(page: Path, folder: Path, *flags: str, fragment: str = "") -> tuple[str, str]:
    """Opens a page in headless Chromium with an empty profile; returns the DOM and what was logged."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    found = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={folder}", *flags, f"{page.as_uri()}{fragment}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout, "\n".join(line for line in found.stderr.splitlines() if "CONSOLE" in line)


@needs_chromium
@pytest.mark.slow
def test_sorting_in_a_browser(tmp_path, opened):
    comparison, pictures, page = opened
    file = pictures.folder.parent / "comparison.html"
    mean = {
        arm["name"]: arm["summary"].get("privacy.extraction.verified", {}).get("mean") for arm in comparison["arms"]
    }
    dom, log = browse(file, tmp_path / "a", "--dump-dom", fragment="#sort=verified")
    shown = [mean[name] for name in body_of_the_table(dom)]
    assert shown[:-1] == sorted(shown[:-1]) and shown[-1] is None and log == ""
    assert dom.count("<button") == len(re.findall(r"data-key=", dom)) >= 11 and 'aria-sort="ascending"' in dom
    dom, _ = browse(file, tmp_path / "b", "--dump-dom", fragment="#sort=-verified")
    shown = [mean[name] for name in body_of_the_table(dom)]
    assert shown[:-1] == sorted(shown[:-1], reverse=True) and shown[-1] is None and 'aria-sort="descending"' in dom
    assert body_of_the_table(page.source) == list(ARMS)  # as written


@needs_chromium
@pytest.mark.slow
def test_without_scripts_the_table_is_complete(tmp_path, opened):
    """A script that differs from the hash by one letter is refused, and the page says the same."""
    _, pictures, page = opened
    file = pictures.folder.parent / "blocked.html"
    file.write_text(page.source.replace("<script>(() => {", "<script>( () => {"))
    dom, log = browse(file, tmp_path / "a", "--dump-dom", fragment="#sort=verified")
    assert "Content Security Policy" in log and "<button" not in dom and "<th aria-sort" not in dom
    assert body_of_the_table(dom) == list(ARMS)
    assert (
        re.sub(r"\s+", " ", "".join(Numbers(dom).all_text)).strip()
        == re.sub(r"\s+", " ", "".join(Numbers(page.source).all_text)).strip()
    )


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1280])
def test_nothing_sticks_out_sideways(tmp_path, opened, width):
    """The page measures itself: no element but what scrolls on its own is wider than the window."""
    _, pictures, page = opened
    file = pictures.folder.parent / f"wide{width}.html"
    probe = "document.title = document.documentElement.scrollWidth - innerWidth;"
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.source)
    file.write_text(without.replace("</script>", f"</script><script>{probe}</script>"))
    dom, _ = browse(file, tmp_path / "a", "--dump-dom", f"--window-size={width},900")
    assert int(re.search(r"<title>(-?\d+)</title>", dom).group(1)) <= 0
    shot = tmp_path / "page.png"
    browse(file, tmp_path / "b", f"--screenshot={shot}", f"--window-size={width},900")
    assert shot.stat().st_size > 10_000


def _leaves(value):
    if isinstance(value, dict | list):
        yield from (key for key in value if isinstance(value, dict))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield value
