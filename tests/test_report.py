import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from defenses.errors import UserError
from eval.report import ReportConfig, render
from tests.fabricate import HOSTILE, Fabricated

FORBIDDEN = re.compile(r"\b(anonymous|anonymi[sz]ed|safe|compliant)\b", re.IGNORECASE)


class Page(HTMLParser):
    """Tags, attributes, visible text and pictures of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self.hidden = [], [], [], 0
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.visible = re.sub(r"\s+", " ", " ".join(self.text))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.hidden += tag in ("style", "title")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("style", "title")

    def handle_data(self, data):
        if not self.hidden:
            self.text.append(data)

    def pictures(self) -> list[np.ndarray]:
        """Decoded PNG images, uint8 [H, W]."""
        uris = [value for tag, name, value in self.attributes if tag == "img" and value.startswith("data:image/png")]
        opened = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]
        return [np.asarray(image) for image in opened]


def make(folder, *, restricted=False, config=None, change=None, **options):
    run = Fabricated(folder / "run", **options)
    if change:
        change(run.report)
    render(run.folder, run.report, images=run.image, restricted=restricted, config=config or ReportConfig())
    return run, Page(run.folder / "report.html")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A run and its page, without restriction."""
    return make(tmp_path_factory.mktemp("opened"))


def shows(page: Page, pictures: np.ndarray) -> list[bool]:
    shown = {image.tobytes() for image in page.pictures()}
    return [picture[0].tobytes() in shown for picture in pictures]


def leaves(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def test_one_file_without_scripts_or_addresses(opened):
    run, page = opened
    assert (run.folder / "report.html").stat().st_size < 2_000_000
    assert not {"script", "iframe", "link", "object", "base", "form"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href"):
            assert value.startswith("data:image/")
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert "http://" not in page.source and "https://" not in page.source and "@import" not in page.source


def test_every_number_is_there(opened):
    run, page = opened
    for value in leaves(run.report):
        assert json.dumps(value, ensure_ascii=False) in page.visible or str(value) in page.visible
    headings = re.findall(r"<h2>([^<]*)</h2>", page.source)
    order = ["gives", "Key", "Evidence", "Attack", "copies", "Quality", "Data", "Defenses", "Training", "Generations"]
    order += ["Cost", "not measured", "reproduce"]
    assert len(headings) == len(order) and all(word in text for word, text in zip(order, headings, strict=True))


def test_verdict_in_words(opened):
    _, page = opened
    narrow = "\N{NARROW NO-BREAK SPACE}"
    sentence = f"8 of 40 distinct training pictures were extracted (20.0{narrow}%, 95 % interval 10.5{narrow}% to 34.8{narrow}%"
    assert sentence in page.source
    assert "0 of 31 held-out pictures" in page.visible and "p = 0.0013" in page.visible
    assert not FORBIDDEN.search(page.visible)


def test_pairs_and_samples(tmp_path, opened):
    run, page = opened
    assert shows(page, run.training[:8]) == [True] * 8
    assert shows(page, run.generations) == [True] * 48
    assert set(run.asked) >= {f"rec{i:03d}" for i in range(8)}
    few = make(tmp_path / "few", config=ReportConfig(pairs=3, grid=5))[1]
    assert sum(shows(few, run.training[:8])) == 3 and "3 of 8, the closest first" in few.visible
    none, page = make(tmp_path / "none", config=ReportConfig(pairs=0, grid=0))
    assert page.pictures() == [] and none.asked == []


def test_restricted_shows_no_picture_and_no_name(tmp_path):
    run = Fabricated(tmp_path / "run")
    run.report["run"]["command"] = run.report["data"]["source"] = "folder/of/patients"
    render(run.folder, run.report, images=run.image, restricted=True, config=ReportConfig())
    page = Page(run.folder / "report.html")
    assert run.asked == []  # no training picture was even read
    assert not any(shows(page, run.training)) and not any(shows(page, run.generations))
    assert "rec003" not in page.source and "folder/of/patients" not in page.source
    assert "restricted" in page.visible and "picture 8" in page.visible  # the numbers stay


def test_hostile_names_are_text(tmp_path):
    def change(report):
        report["run"]["name"] = report["data"]["source"] = report["run"]["command"] = HOSTILE
        report["defenses"][0]["claim"]["statement"] = HOSTILE

    run = Fabricated(tmp_path / "run")
    change(run.report)
    columns = "prompt,generations,edges,clique_size,flagged,exact,mean_distance,medoid,record_id,l2,verified"
    row = f'"{HOSTILE.replace(chr(34), chr(34) * 2)}",16,20,5,true,true,0.01,a.png,rec000,0.02,true'
    (run.folder / "attack" / "cliques.csv").write_text(f"{columns}\n{row}\n")
    for restricted in (False, True):
        render(run.folder, run.report, images=run.image, restricted=restricted, config=ReportConfig())
        page = Page(run.folder / "report.html")
        card = re.sub(r"`[^`]*`", "", (run.folder / "MODEL_CARD.md").read_text())  # code spans are literal
        assert "script" not in page.tags and "<script" not in card
        assert page.visible.count(HOSTILE) >= (2 if restricted else 6)  # restricted: no source, no command, no caption
        assert ("prompt 1" in page.visible) == restricted


@pytest.mark.parametrize("restricted", [False, True])
def test_flagged_prompts_with_their_pictures(restricted, tmp_path):
    """The text of a prompt, its figures, its candidate and the nearest picture; of restricted data the figures alone."""
    run = Fabricated(tmp_path / "run", verified=0)  # so that no pair is shown elsewhere
    columns = "prompt,generations,edges,clique_size,flagged,exact,mean_distance,medoid,record_id,l2,verified"
    rows = ["00001,16,20,7,true,true,0.04,000012.png,rec021,0.31,false", "00000,16,90,13,true,true,0.02,000011.png,rec003,0.07,true",
            "00002,16,0,1,false,true,,,,,false", "00003,16,9,4,true,true,0.05,gone.png,rec030,0.4,false"]  # fmt: skip
    (run.folder / "attack" / "cliques.csv").write_text("\n".join([columns, *rows]) + "\n")
    index = (
        'file,index,seed,condition,withheld\n000011.png,11,0,"a heart, large",false\n000012.png,12,0,two lungs,false\n'
    )
    (run.folder / "generations" / "index.csv").write_text(index)
    run.report["privacy"]["extraction"] |= {"protocol": "prompted", "prompts": 4, "candidates": 3}
    run.report["privacy"]["extraction"]["streamed"] = {"images_kept": 48}
    config = ReportConfig(pairs=2, grid=0)
    render(run.folder, run.report, images=run.image, restricted=restricted, config=config)
    page = Page(run.folder / "report.html")
    table = page.visible[page.visible.index("Flagged prompts", page.visible.index("The candidate of a prompt") - 99) :]
    assert table.index("0.020") < table.index("0.040") < table.index("0.050")  # the tightest first
    assert "48 of 4" in page.visible and "were kept" in page.visible
    if restricted:
        assert "prompt 1 16 13 0.020 – 12 0.070 true" in table and not page.pictures()
        assert not any(text in page.source for text in ("rec003", "a heart", "000011", "two lungs"))
        return
    assert (
        "00000 a heart, large 16 13 0.020 rec003 12 0.070 true 00001 two lungs 16 7 0.040 rec021 1 0.310 false 00003 16 4"
        in table
    )
    shown = [np.flatnonzero(shows(page, pictures)).tolist() for pictures in (run.training, run.generations)]
    assert {3, 21} <= set(shown[0]) and {11, 12} <= set(shown[1])
    assert "clique of 13, verified a heart, large" in table and "clique of 7, not verified two lungs" in table


def test_no_hits_and_no_control(tmp_path):
    def change(report):
        report["privacy"]["extraction"]["control"] = None

    _, page = make(tmp_path, verified=0)
    assert "3/40 = 7.5" in page.visible and "(95 %)" not in page.visible
    assert "No training picture was extracted by this attack" in page.visible and not FORBIDDEN.search(page.visible)
    _, page = make(tmp_path / "control", change=change)
    assert "not evidence" in page.visible.lower() and "gives training pictures away" not in page.visible


def test_parts_that_were_not_run(tmp_path):
    """Only images that somebody else generated, nothing else known."""

    def change(report):
        report["privacy"]["extraction"] = report["utility"] = report["model"] = None
        report["data"] |= {"removed_by_dedup": None}
        report["cost"] = {name: None for name in report["cost"]}
        report["defenses"] = []

    run = Fabricated(tmp_path / "run")
    change(run.report)
    for name in ("manifest.csv", "metrics.jsonl", "attack/matches.csv"):
        (run.folder / name).unlink()
    elsewhere = run.folder.parent / "theirs"
    (run.folder / "generations").rename(elsewhere)
    (elsewhere / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    render(run.folder, run.report, images=run.image, restricted=False, config=ReportConfig(), generations=elsewhere)
    page = Page(run.folder / "report.html")
    assert all(shows(page, run.generations)) and "Leakage was not measured" in page.visible
    for part in ("Extraction", "Membership", "Inpainting", "Utility"):
        assert f"{part} was not measured" in page.visible


def test_large_pictures_fit(tmp_path):
    run = Fabricated(tmp_path / "run")
    rng = np.random.default_rng(0)
    for path in sorted((run.folder / "generations").glob("*.png")):
        Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(path)
    large = rng.integers(0, 256, (3, 512, 512), dtype=np.uint8)
    render(run.folder, run.report, images=lambda _: large, restricted=False, config=ReportConfig())
    assert (run.folder / "report.html").stat().st_size < 2_000_000


def test_a_failed_report_leaves_no_file(tmp_path):
    run = Fabricated(tmp_path / "run")
    with pytest.raises(KeyError):
        render(run.folder, run.report, images={}.__getitem__, restricted=False, config=ReportConfig())
    assert not [path for path in run.folder.iterdir() if "report" in path.name or "CARD" in path.name]


def test_bad_settings():
    with pytest.raises(UserError, match="report.pairs"):
        ReportConfig(pairs=-1)
