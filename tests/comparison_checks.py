"""A fabricated comparison with its page, and what must hold of the numbers of every such page."""

import html
import re
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np

from eval import comparison_page
from eval.quoted import RULES
from tests.fabricate_comparison import fabricate
from tests.test_report import Page

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
        comparison_page.render(
            folder / "phantom",
            comparison,
            restricted=restricted,
            images=(lambda _, record: pictures.image(record)) if images else None,
        )
    return comparison, pictures, Page(folder / "phantom" / "comparison.html")


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


def check_paths(comparison, source: str) -> int:
    """Every marked number is the one at its path, written by its rule; returns how many there are."""
    quoted = Numbers(source).quoted
    for path, rule, value, text in quoted:
        found = list(at(comparison, path))
        assert len(found) == 1 and str(found[0]) == value and RULES[rule](found[0]) == text
    return len(quoted)


def check_prose(comparison, source: str) -> None:
    """The rest of the text quotes strings of the JSON, and has no other digits."""
    strings = {token for leaf in leaves(comparison) for token in NUMBER.findall(str(leaf))} | CONSTANTS
    assert set(NUMBER.findall(" ".join(Numbers(source).prose))) <= strings


def check_rounding(comparison, source: str) -> None:
    """Without the paths: each number in the visible text is a value of comparison.json at the precision it is shown with."""
    text = " ".join(Numbers(source).all_text).replace("\N{NARROW NO-BREAK SPACE}", " ")
    strings, values = [], []
    for leaf in leaves(comparison):
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


def leaves(value):
    if isinstance(value, dict | list):
        yield from (key for key in value if isinstance(value, dict))
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield value
