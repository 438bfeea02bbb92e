import base64
import hashlib
import html
import json
import re

import pytest

from eval.comparison import assemble
from eval.comparison_page import render
from eval.quoted import RULES, Quoted, lookup
from tests import comparisons
from tests.comparison_checks import (
    Numbers,
    at,
    body_of_the_table,
    check_paths,
    check_prose,
    check_rounding,
    leaves,
    make,
)
from tests.fabricate import HOSTILE
from tests.fabricate_comparison import ARMS, fabricate
from tests.test_report import FORBIDDEN, Page, shows


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return make(tmp_path_factory.mktemp("opened"), figures=True)


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
    order = [
        "verdict",
        "table",
        "others",
        "plane",
        "along",
        "copies",
        "correlation",
        "trend",
        "findings",
        "evidence",
        "samples",
    ]
    assert ids == [*order, "reproduce", "not-measured", "reading"]
    assert not FORBIDDEN.search(page.visible)


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
    arms, keywords = comparisons.write_comparison(tmp_path)
    comparison = assemble(arms, **keywords)
    render(tmp_path, comparison, restricted=False, images=lambda *_: comparisons.picture(1))
    page = Page(tmp_path / "comparison.html")
    assert check_paths(comparison, page.source) > 150
    check_prose(comparison, page.source)
    check_rounding(comparison, page.source)
    assert body_of_the_table(page.source) == [arm.name for arm in arms]


def test_all_fields_are_listed(opened):
    comparison, _, page = opened
    table = page.source[page.source.index('<table class="keys fields">') :]
    cells = [html.unescape(text) for text in re.findall(r'<tr><th scope="row">.*?</th><td>(.*?)</td></tr>', table)]
    listed = [leaf for cell in cells for leaf in leaves([json.loads(cell)])]
    expected = [leaf for leaf in leaves(comparison) if not isinstance(leaf, str)]
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
    assert "The guard protects the outputs, not the weights." in page.visible
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
    render(
        tmp_path / "phantom",
        comparison,
        restricted=False,
        images=lambda _, record: pictures.image(record),
        pairs=0,
        grid=9,
    )
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
        render(tmp_path / "phantom", comparison, restricted=False, images=lambda _, record: {}[record])
    assert not list((tmp_path / "phantom").glob("*comparison.html*"))
