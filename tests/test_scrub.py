"""Scrubbing against captions written by hand, with what a person would strike out."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import UserError
from defenses.identifiers import RULES, compiled
from defenses.scrub import Scrub, ScrubConfig
from tests.test_captions import context

# rule, caption, what is left
STRUCK = [
    ("marks", "___ year old man with ___, no effusion", "year old man with, no effusion"),
    ("marks", "a ___-year-old woman", "a year-old woman"),
    ("marks", "Comparison: [**2101-3-4**]. Clear lungs.", "Comparison. Clear lungs."),
    ("marks", "seen at [**Hospital 12**] [**First Name (Titles)**]", "seen at"),
    ("marks", "XXXX-year-old female. Heart size normal, XXXX.", "year-old female. Heart size normal."),
    ("marks", "film of <NAME>, <DATE_1> and [PATIENT NAME] {id}", "film of, and"),
    ("marks", "film ([REDACTED]) of the chest (name removed)", "film of the chest"),
    ("marks", "film of **** [De-identified]", "film of"),
    ("dates", "film of 2021-03-04 and 2021/3/4", "film of and"),
    ("dates", "film of 3/4/21, 04.03.2021, 31-12-1999.", "film of."),
    ("dates", "on March 4, 2021 and 4th of march 2021", "on and"),
    ("dates", "am 4. März, im Mai 2021", "am, im"),
    ("dates", "taken Mar 4th, then 12 Dec.", "taken, then"),
    ("dates", "study 20210304 complete", "study complete"),
    ("times", "at 14:30, 2:05 p.m., 9 AM and 14.30 Uhr, 08:15:22.123456", "at, and"),
    ("contacts", "write to a.b+c@mail.example.org or see https://example.org/p?id=3", "write to or see"),
    ("contacts", "Ruf: Tel. 0511/532-0, fax: (0511) 532 99; phone 12 pro", "Ruf; phone 12 pro"),
    ("contacts", "call +49 511 532 12 or (511) 555-1234 or 555-123-4567", "call or or"),
    ("contacts", "Ruf 0511 5321234", "Ruf"),
    ("numbers", "MRN: 4711, Accession no. A-12, patient id 77b", ""),
    ("numbers", "s50414267 of p10046166", "of"),
    ("numbers", "uid 1.2.840.113619.2.5.1762583153.215519.978957063.78.", "uid."),
    ("numbers", "123e4567-e89b-12d3-a456-426614174000 and 078-05-1120", "and"),
    ("names", "read by Dr. Smith", "read by"),
    ("names", "Prof. Dr. med. Anna B. Müller-Lüdenscheidt saw Mrs. O'Hara", "saw"),
    ("names", "Frau Meier, Herrn Schulze", ""),
]  # fmt: skip
KEPT = [
    "chest x-ray, PA view, COVID-19, female patient",
    "flat emoji icon of keycap number sign, number, symbol, white background",
    "a 67-year-old man in 1999, 5 x 6 cm, 16:9, 3/4 of the heart, grade 2-3",
    "snake_case __init__ XXX **bold** (date) (left) <left> MR Thorax, DR Chest, PD Weighted, MS Lesion",
    "image 1 may show 12 mar of them; may 3 boats pass in march",
    "ratio 0.123456, 12,345 pixels, version 1.2.3, id card, ID Number",
    "T1 T2 L5/S1 C3-C4, 3 o'clock, 120/80, p < 0.05, 100 000 cells",
    "the doctor said  twice   nothing ,  really ( ) .",
]


@pytest.mark.parametrize(("rule", "caption", "left"), STRUCK)
def test_each_rule_strikes_what_it_says(rule, caption, left):
    others = dict.fromkeys(RULES, False)
    assert Scrub(ScrubConfig(**(others | {rule: True}))).rewrite([caption]) == [left]


def test_ordinary_captions_stay_to_the_letter():
    assert Scrub(ScrubConfig()).rewrite(KEPT) == KEPT


def test_a_kind_that_is_off_strikes_nothing():
    for rule, caption, _ in STRUCK:
        kept = Scrub(ScrubConfig(**(dict.fromkeys(RULES, False) | {"patterns": ["§§§"]}))).rewrite([caption])
        assert kept == [caption], rule


def test_what_a_removal_brings_together_is_found():
    assert Scrub(ScrubConfig()).rewrite(["[**[**x**]**] on Tel. ___ 53 12"]) == ["on"]
    assert Scrub(ScrubConfig()).rewrite(["___20210304"]) == [""]
    nested = ["a " + "[**" * depth + "x" + "**]" * depth + " b" for depth in (1, 19, 500)]
    assert Scrub(ScrubConfig()).rewrite(nested) == ["a b", "a b", ""]  # no text nests so deep: nothing of it is kept


PARTS = [caption for _, caption, _ in STRUCK] + KEPT + [" ", ",", "(", ")", ".", "-", "___", "[**", "**]", "1", "2021"]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(PARTS), max_size=5).map("".join))
def test_twice_is_once(caption):
    scrub = Scrub(ScrubConfig())
    (once,) = scrub.rewrite([caption])
    assert scrub.rewrite([once]) == [once] and len(once) <= len(caption)
    assert all(not pattern.search(once) for patterns in scrub._rules.values() for pattern in patterns)


def test_each_caption_by_itself_and_in_any_order_of_patterns():
    captions = [caption for _, caption, _ in STRUCK]
    together = Scrub(ScrubConfig()).rewrite(captions)
    assert together == [Scrub(ScrubConfig()).rewrite([caption])[0] for caption in captions]
    patterns = [r"[Ff]ilm", r"film of", r"of \w+"]
    for order in (patterns, patterns[::-1], patterns[1:] + patterns[:1]):
        assert Scrub(ScrubConfig(patterns=order)).rewrite(captions) == Scrub(ScrubConfig(patterns=patterns)).rewrite(
            captions
        )


def test_a_match_inside_another_goes_with_it():
    assert Scrub(ScrubConfig(patterns=["abcdef", "bc"])).rewrite(["x abcdefgh"]) == ["x gh"]


def test_own_patterns():
    scrub = Scrub(ScrubConfig(patterns=[r"mhh-[0-9a-f]{8}", r"(?i)ward \d"]))
    assert scrub.rewrite(["film of mhh-024e7871, WARD 3"]) == ["film of"]


def test_findings_count_captions_and_tell_no_text():
    """By hand: four captions and a record without, three with marks or dates, two of which are left empty."""
    scrub = Scrub(ScrubConfig(contacts=False, names=False, patterns=["zebra"]))
    scrub.begin(_loud(["x"]))
    scrub.rewrite(["___ and ___ on 2021-03-04", "plain", "", "___", "zebra zebra, 3/4/2020"])
    found = scrub.findings()
    rules = {"marks": 2, "dates": 2, "times": 0, "numbers": 0, "patterns": 1}
    assert found == {"captions": 4, "changed": 3, "emptied": 2, "rules": rules}
    resumed = Scrub(ScrubConfig(contacts=False, names=False, patterns=["zebra"]))
    resumed.load_state_dict(json.loads(json.dumps(scrub.state_dict())))
    assert resumed.findings() == found


def test_a_private_run_counts_nothing():
    scrub = Scrub(ScrubConfig())
    scrub.begin(context(["x"]))  # quiet unless the trainer says otherwise
    scrub.rewrite(["___"])
    assert scrub.findings() is None and scrub.state_dict() == {}


def _loud(captions):
    quiet = context(captions)
    return type(quiet)(**(vars(quiet) | {"quiet": False}))


@pytest.mark.parametrize(
    "text",
    [
        "_" * 50_000, "X" * 50_000, "[**" * 20_000, "[**" + "x" * 50_000, "1." * 25_000, "1" * 50_000, "1" * 50_000 + "a", "1-" * 25_000,
        "a" * 50_000 + "@", "a@" * 20_000, "a.b-" * 12_000 + "@", "(" * 50_000, "(0511) " * 8_000, "0511 " * 10_000, "12:30" * 10_000,
        "Dr. " * 12_000, "Dr. A" * 10_000, "March " * 9_000, "1st of " * 8_000, "[patient " * 6_000, "ID " * 15_000, "ID-" * 15_000,
        "-" * 50_000 + "___x", ", " * 25_000 + "___x", " " * 50_000 + "___ .", "[**" * 2_000 + "x" + "**]" * 2_000, "+49 " * 12_000,
    ],
    ids=lambda text: f"{text[:8]}{len(text)}",
)  # fmt: skip
def test_no_caption_takes_for_ever(text):
    """Fifty thousand characters of what comes near a pattern: a power of the length would take minutes."""
    started = time.perf_counter()
    Scrub(ScrubConfig()).rewrite([text])
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "pattern",
    [r"mhh-\w+", r"(?:ab)+c", r"(ab){2,3}", r"(?i)ward (?:north|south)?", r"[(+*]+x", r"\(a+\)+", r"(?P<a>x)y+(?P=a)", r"(?<=a)b{3}"],
)  # fmt: skip
def test_safe_patterns_are_taken(pattern):
    assert compiled("k", pattern).pattern == pattern


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"(a+)+b", "repeats a group"),
        (r"(?:a|aa)*b", "repeats a group"),
        (r"((ab?)c){2,}", "repeats a group"),
        (r"(?P<x>\w*\d)+$", "repeats a group"),
        (r"(?i)(?:x{1,3}){5}", "repeats a group"),
        (r"a*", "matches the empty text"),
        (r"\b", "matches the empty text"),
        (r"(unclosed", "no regular expression"),
        ("x" * 201, "201 characters"),
    ],
)
def test_unsafe_patterns_are_refused(pattern, words):
    with pytest.raises(UserError, match=r"defenses\.scrub\.patterns") as caught:
        ScrubConfig(patterns=[pattern])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_to_remove_is_refused():
    with pytest.raises(UserError, match="nothing to remove"):
        ScrubConfig(**dict.fromkeys(RULES, False))
