"""The comparison page in headless Chromium: it sorts, it does without scripts, it fits into narrow windows."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.comparison_checks import Numbers, body_of_the_table, make
from tests.fabricate_comparison import ARMS

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return make(tmp_path_factory.mktemp("opened"), figures=True)


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
@pytest.mark.parametrize("width", [360, 1280])
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
