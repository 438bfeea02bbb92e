"""The attacks beyond extraction on the page and the model card: every figure, its interval, and what must not be shown."""

import pytest

from eval import attackwords
from eval.card import model_card
from eval.report import ReportConfig, render
from tests.fabricate import Fabricated
from tests.fabricate_attacks import SECRET, fabricate_attacks
from tests.test_report import FORBIDDEN, Page, shows

# text of every figure as the page must give it, by the section that holds it
FIGURES = {
    "cost": ["2 min 21 s", "1 min 2 s", "1 min 33 s"],
    "membership": [
        "1,234", "2,345", "0.812", "0.780 to 0.844", "0.923", "42.3", "37.3", "Strong LiRA", "too few", "0.835", "29 people", "23 held out",
        "0.512", "0.457 to 0.568", "0.111", "1e-08", "Clopper-Pearson over 1,234 members", "0.0021", "13 people", "57",
    ],
    "inpainting": ["321", "11 fills", "0.099", "0.165", "0.067", "0.0008", "0.765", "0.654 to 0.843", "0.140", "0.234", "0.178", "0.212", "0.56"],
    "finetuning": [
        "29 prompts", "346", "1,357", "83", "3.5", "23", "2.7", "13.8", "4 of 77", "23 of 77", "0.0014", "0.062", "0.154", "0.176", "14", "6",
        "0.12", "0.023", "0.046", "0.369", "0.258", "22.1", "11.2", "l2 0.032", "17 of 26", "3 of 27", "0.017", "0.03", "0.038",
    ],
    "canaries": ["1,024", "2.72", "9.88", "33.3", "0.018", "8.77", "64 times", "once", "0.654", "0.0031", "151 of 202", "0.834", "1.987"],
    "copy-metrics": ["above 0.432", "131", "19", "5.4", "a rule", "71", "61", "53", "4,686", "SSIM", "143 generations, 23 pictures above 0.765, 6.4", "38.1", "0.412", "0.743", "0.398", "0.657"],
    "prefilter": [
        "4,321 prompts", "Wen et al.", "1 min 23 s", "4,320", "flagged 87", "verified 0", "top 1.0", "23.4", "13.6", "34.7", "top 50.0", "87.6", "0.923",
        "0.812 to 0.975 (Obuchowski)", "A note on it.",
    ],
    "risk": ["1 of 3", "6.1", "0.111", "0.222", "0.346", "0.210 to 0.470", "0.0043", "37", "Strong LiRA at 1.0", "verified first"],
}  # fmt: skip


def make(folder, restricted=False):
    run = Fabricated(folder / "run")
    run.report["privacy"] |= fabricate_attacks(run.folder)
    run.report["cost"] |= {"membership_seconds": 141.2, "inpainting_seconds": 62.4, "finetuning_seconds": 93.1}
    render(run.folder, run.report, images=run.image, restricted=restricted, config=ReportConfig())
    return run, Page(run.folder / "report.html")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return make(tmp_path_factory.mktemp("attacks"))


def section(page: Page, name: str) -> str:
    """Source of one section without tags, spaces as one."""
    part = page.source.split(f'<section id="{name}">')[1].split("</section>")[0]
    text = Page.__new__(Page)
    super(Page, text).__init__()
    text.tags, text.attributes, text.text, text.hidden = [], [], [], 0
    text.feed(part)
    return " ".join(" ".join(text.text).replace("\N{NARROW NO-BREAK SPACE}", " ").split())


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_in_its_section(opened, name):
    text = section(opened[1], name)
    assert [figure for figure in FIGURES[name] if figure not in text] == []
    assert not FORBIDDEN.search(text)


def test_reconstructions_stand_beside_their_pictures(opened):
    run, page = opened
    row = int(SECRET.removeprefix("rec"))
    assert shows(page, run.training[row : row + 1]) == [True]
    assert all(any((image == value).all() for image in page.pictures()) for value in (77, 99))


def test_restricted_pages_show_neither_pictures_nor_ids(tmp_path):
    run, page = make(tmp_path, restricted=True)
    assert SECRET not in page.source and run.asked == [] and page.pictures() == []
    assert "0.923" in section(page, "membership")  # figures stay


def test_sections_without_a_measurement_are_left_out(tmp_path):
    run = Fabricated(tmp_path / "run")
    render(run.folder, run.report, images=run.image, restricted=False, config=ReportConfig())
    page = Page(run.folder / "report.html")
    assert not any(f'id="{name}"' in page.source for name in FIGURES if name != "cost")
    assert "Membership was not measured" in page.visible


def test_the_card_and_the_verdict_tell_of_them(opened):
    run, page = opened
    card = model_card(run.report)
    for text in attackwords.sentences(run.report["privacy"]):
        assert " ".join(text.split()) in page.visible
    assert "0.923 (95 %: 0.891 to 0.956" in card and "Strong LiRA" in card
    assert "0.067 in l2 nearer than held-out ones (p = 0.0008)" in card
    assert "w = 3.5), 23 of 346 distinct training pictures" in card and "4 of 77 held-out pictures (p = 0.0014)" in card
    assert "0.023 in l2 nearer to training pictures than held-out ones (p = 0.046)" in card
    assert "64 times has an exposure of 8.8 of at most 10.0 bits" in card


def test_a_failed_check_withdraws_the_evidence(tmp_path):
    run = Fabricated(tmp_path / "run", verified=0)
    parts = fabricate_attacks(run.folder)
    parts["canaries"] = parts["finetuning"] = None  # they need no other side
    parts["membership_check"] |= {"passed": False, "note": "the sides come from two cameras"}
    run.report["privacy"] |= parts
    render(run.folder, run.report, images=run.image, restricted=False, config=ReportConfig())
    page = Page(run.folder / "report.html")
    assert "No evidence." in section(page, "membership") and "two cameras" in section(page, "membership")
    assert "No training picture was extracted by this attack" in page.visible
