"""Scrubbing of captions (seam 1c): de-identification marks and identifiers are removed before training.

Marks such as ``___`` are few, rare words that stand in the captions of few patients each: prompts with them are the most
memorised ones of a model trained on MIMIC-CXR, and mitigations at inference do not help (Dutt 2025). Identifiers
should not be in a caption at all: a model that is trained on them can be asked for them.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from defenses.base import Defense, RunContext
from defenses.errors import UserError
from defenses.identifiers import RULES, compiled

BRACKETS = re.compile(r"\( ?\)|\[ ?\]|\{ ?\}|< ?>|\" ?\"")  # emptied ones
BEFORE = re.compile(r" (?=[,;:.!?)\]}])")  # no blank before these
AFTER = re.compile(r"(?<=[(\[{]) ")
DOUBLED = re.compile(r"[,;:](?: ?[,;:])*(?= ?[,;:.])")  # ", ," and ", ."
STRAY_START, STRAY_END = " ,;:.)]}/-", " ,;:([{/-"
PASSES = 20  # marks nested deeper than this are no text, and would take time with the square of their depth


@dataclass(kw_only=True)
class ScrubConfig:
    """Settings of `Scrub`: which kinds are removed (`defenses.identifiers` has the patterns)."""

    marks: bool = True  # ___, ***, [**...**], XXXX, <NAME>, [PATIENT NAME], [REDACTED], (name removed)
    dates: bool = True  # 2021-03-04, 3/4/21, 04.03.2021, March 4, 2021, 4. März, 20210304; not a year alone
    times: bool = True  # 14:30, 2:05 p.m., 14.30 Uhr
    contacts: bool = True  # e-mail addresses, web addresses, telephone numbers
    numbers: bool = True  # of six digits and more, DICOM and other unique identifiers, what follows MRN, accession, ID
    names: bool = True  # after Dr., Prof., Mr., Mrs., Ms., Herr, Frau
    # further patterns (Python's re) that are removed, e.g. the form of your patient ids; of at most 200 characters, without
    # repeated groups that repeat or choose inside; (?i) at the start ignores case
    patterns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            compiled("defenses.scrub.patterns", pattern)
        if not self.patterns and not any(getattr(self, name) for name in RULES):
            raise UserError("defenses.scrub", "has nothing to remove", "switch a kind on, give patterns, or null")


class Scrub(Defense):
    """Removes what the patterns match from each caption by itself, until none matches any more. What still has a match after `PASSES`
    passes is dropped whole.

    All matches of a pass are found on the same text, so the order of the patterns does not matter; applied again it changes
    nothing. A caption without a match stays bit for bit; in the others, blanks, empty brackets and stray commas are cleared away.
    """

    name = "scrub"
    needs_captions = True

    def __init__(self, config: ScrubConfig):
        self.config = config
        rules = {name: patterns for name, patterns in RULES.items() if getattr(config, name)}
        self._rules = {name: [re.compile(pattern) for pattern in patterns] for name, patterns in rules.items()}
        if config.patterns:
            self._rules["patterns"] = [compiled("defenses.scrub.patterns", pattern) for pattern in config.patterns]
        self._counts: Counter[str] = Counter()
        self._quiet = True

    def begin(self, context: RunContext) -> None:
        self._quiet = context.quiet

    def rewrite(self, captions: list[str]) -> list[str]:
        """The scrubbed captions, in the same order; one of which nothing is left is the empty text."""
        self._counts = Counter(
            {name: 0 for name in self._rules}, captions=sum(bool(caption.strip()) for caption in captions)
        )
        return [self._scrub(caption) for caption in captions]

    def _scrub(self, caption: str) -> str:
        text, hit = caption, set()
        for _ in range(PASSES):  # a removal can bring together what matches
            found = {name: self._spans(name, text) for name in self._rules}
            spans = sorted(chain.from_iterable(found.values()))
            left = _without(text, spans) if spans else text
            if left == text:
                break
            text, hit = left, hit | {name for name, some in found.items() if some}
        else:
            text = ""
        self._counts.update(hit)
        self._counts["changed"] += text != caption
        self._counts["emptied"] += bool(caption.strip()) and not text
        return text

    def _spans(self, rule: str, text: str) -> list[tuple[int, int]]:
        return [match.span() for pattern in self._rules[rule] for match in pattern.finditer(text) if match[0]]

    def claim(self) -> dict[str, Any]:
        return {
            "kind": "heuristic",
            "statement": "Removes known marks of de-identification and identifiers of known forms from the captions. No guarantee: "
            "it does not know names without a title, places, rare diseases or occupations, identifiers of fewer than six digits or of a "
            "form of their own, or what is told in other words; it does not read what is written in the pictures; and a picture can be "
            "memorised whatever its caption says.",
        }

    def findings(self) -> dict[str, Any] | None:
        """How many captions (of all records, held-out ones too) there are, were changed, left empty, and changed by each rule; never
        their text. None: not counted, or not to be told."""
        if self._quiet or not self._counts:
            return None
        totals = {name: self._counts[name] for name in ("captions", "changed", "emptied")}
        return {**totals, "rules": {name: self._counts[name] for name in self._rules}}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._quiet else {"counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "counts" in state:
            self._counts, self._quiet = Counter(state["counts"]), False


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without the given parts (ascending, may overlap), cleaned."""
    kept, end = [], 0
    for start, stop in spans:
        kept.append(text[end:start])
        end = max(end, stop)
    text = " ".join(" ".join([*kept, text[end:]]).split())
    for pattern, to in ((BRACKETS, " "), (BEFORE, ""), (AFTER, ""), (DOUBLED, "")):
        text = pattern.sub(to, text)
    return " ".join(text.split()).lstrip(STRAY_START).rstrip(STRAY_END)
