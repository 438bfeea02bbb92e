"""Patterns of de-identification marks and identifiers in captions (English and German), and a check of patterns that users give.

Long repetitions can be read in one way only, the others are bounded: the time that a pattern takes grows with the length of the
caption, not with a power of it (`tests/test_scrub.py`).
"""

import re

from defenses.errors import UserError

LONGEST_PATTERN = 200  # characters of a pattern that a user gives
PROBE = "a B1_,-.\n c"  # words, numbers and what lies between them

_MONTH = (
    r"(?:jan(?:uary|uar)?|feb(?:ruary|ruar)?|mar(?:ch)?|märz|apr(?:il)?|may|mai|june?|juni|july?|juli|aug(?:ust)?|"
    r"sept?(?:ember)?|o[ck]t(?:ober)?|nov(?:ember)?|de[cz](?:ember)?)"
)
_NAMED_MONTH = rf"(?=[A-Z])(?i:{_MONTH})\b"  # "may" and "mar" are words, too
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_YEAR = r"(?:1[89]|20|21|22)\d\d"  # shifted years, as in MIMIC, lie in the 22nd and 23rd century
_KIND = (
    r"(?:patient|pt|doctor|physician|provider|person|staff|first|last|full|sur|given|family|user|hospital|clinic|location|street|city|"
    r"state|country|address|zip|postcode|date|time|day|month|year|age|dob|birth|phone|telephone|fax|email|url|web|id|mrn|ssn|"
    r"account|accession|number|name|phi|pii|org|organi[sz]ation|company|profession|arzt|ort|datum|alter|telefon)"
)
_GONE = (
    r"(?:redacted|removed|deleted|withheld|masked|blinded|censored|anonymi[sz]ed|de-?identified|pseudonymi[sz]ed|"
    r"geschwärzt|entfernt|anonymisiert)"
)
_NAME = r"[A-ZÀ-ÖØ-Þ][\w'’-]{1,40}"

# each pattern says where it may begin, so that no match starts in the middle of a word or number
MARKS = (
    r"_{3,}-?",  # MIMIC-CXR; with the hyphen of ___-year-old
    r"\*{3,}",
    r"\[\*\*[^\[\]]{0,200}\*\*\]",  # MIMIC-III: [**2101-3-4**], [**Hospital 12**]
    r"(?<!\w)X{4,}(?!\w)-?",  # Open-i
    rf"(?i:[<\[{{]{{1,2}}\s?{_KIND}(?:[ _:/#-]{{0,2}}(?:{_KIND}|\d{{1,6}})){{0,3}}\s?[>\]}}]{{1,2}})",  # <NAME_1>, [PATIENT NAME]
    rf"(?i:[<\[({{]{{1,2}}\s?(?:{_KIND}[ _:-])?{_GONE}(?:[ _:-]{_KIND})?\s?[>\])}}]{{1,2}})",  # [REDACTED], (name removed)
)
DATES = (
    rf"(?<![\d.])(?<!\d[-/]){_YEAR}([-/.]){_DAY}\1{_DAY}(?!\d)",  # 2021-03-04
    rf"(?<![\d.])(?<!\d[-/]){_DAY}([-/.]){_DAY}\1(?:{_YEAR}|\d\d)(?!\d)(?![./-]\d)",  # 3/4/21, 04.03.2021
    rf"(?i:(?<!\w){_DAY}(?:st|nd|rd|th|\.)? (?:of )?{_MONTH}\b\.?,? {_YEAR}(?!\d))",  # 4th of march 2021, 4. März 2021
    rf"(?i:(?<!\w){_MONTH}\b\.?,? (?:{_DAY}(?:st|nd|rd|th)?,? )?{_YEAR}(?!\d))",  # march 4, 2021; march 2021
    rf"(?<!\w){_DAY}(?:st|nd|rd|th|\.)? (?:of )?{_NAMED_MONTH}\.?",  # 4 March, 4. März
    rf"(?<!\w){_NAMED_MONTH}\.? {_DAY}(?:st|nd|rd|th)?(?!\w)",  # March 4th
    r"(?<!\d)(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)",  # 20210304, as in DICOM
)
TIMES = (
    r"(?<![\d:.])(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d{1,6})?)?(?![\d:])(?: ?(?i:[ap]\.m\.|[ap]m\b|uhr\b|h\b))?",
    r"(?<![\d:.])(?:0?[1-9]|1[0-2]) ?(?i:[ap]\.m\.|[ap]m\b)",
    r"(?<![\d:.])(?:[01]?\d|2[0-3])\.[0-5]\d ?(?i:uhr\b)",
)
CONTACTS = (
    r"(?<![\w.%+-])[\w.%+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}",
    r"(?i:\b(?:https?://|www\.))[^\s<>\"]+",
    r"(?i:\b(?:tel(?:efon|ephone)?|phone|fax|fon|mobile?|pager)\b)[.: #]{0,3}\+?[\d(][\d()./ -]{2,20}\d",
    r"(?<![\w+])(?:\+|00)[1-9]\d{0,2}(?:[ ./()-]{1,2}\d{2,6}){2,6}(?!\d)",  # +49 511 532 12
    r"(?<![\w+])\(\d{2,5}\) ?\d{3,5}[ -]?\d{3,6}(?!\d)",  # (511) 555-1234
    r"(?<![\w.-])\d{3}([-. ])\d{3}\1\d{4}(?!\d)",  # 555-123-4567
    r"(?<![\w.-])0\d{2,4}[ /-]{1,2}\d{4,8}(?!\d)",  # 0511 5321234
)
NUMBERS = (
    r"(?<![\d.])[0-2](?:\.\d+){4,}",  # DICOM unique identifiers
    r"(?i:(?<![\w-])[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}(?![\w-]))",  # UUID
    r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])",  # social security number
    r"(?i:\b(?:mrn|accession|pat(?:ient)?[ -]?id|patient (?:no|number)|patienten(?:nummer|nr)|case (?:no|number)|fall(?:nummer|nr)|"
    r"study (?:id|no|number)|record (?:no|number)|chart (?:no|number)|ssn|insurance (?:no|number)|id)\b)"
    r"(?: ?(?i:no|nr|number|is)\b)?[.:# =]{0,3}(?=[\w-]{0,20}\d)[\w-]{2,40}",  # MRN: 4711, Accession no. A-12
    r"(?<!\w)(?<!\d[.,])[A-Za-z]{0,4}[-_]?\d{6,}(?!\w)",  # six digits and more: s50414267, ACC-123456
)
NAMES = (
    r"\b(?:Dr|Prof|Mr|Mrs|Ms|Herrn?|Frau)\b\.?(?:[ -]{1,2}(?:Dr|Prof|med|dent|rer|nat|habil|Priv|Doz)\b\.?){0,4}"
    rf"[ -]{{1,2}}{_NAME}(?: [A-ZÀ-ÖØ-Þ]\.)?(?: {_NAME})?",  # Prof. Dr. med. Anna B. Muster
)

RULES = {"marks": MARKS, "dates": DATES, "times": TIMES, "contacts": CONTACTS, "numbers": NUMBERS, "names": NAMES}


def compiled(key: str, pattern: str) -> re.Pattern[str]:
    """A pattern that a user gives, if its time cannot explode.

    Args:
        key: dotted configuration key, for the error.

    Raises:
        UserError: it is too long, no pattern, matches nothing at all, or repeats a group with repetitions or alternatives inside.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise UserError(key, f"a pattern has {len(pattern)} characters", f"at most {LONGEST_PATTERN}; give several")
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise UserError(
            key, f"{pattern!r} is no regular expression: {error}", "see the documentation of Python's re"
        ) from None
    if any(match.start() == match.end() for text in ("", PROBE) for match in found.finditer(text)):
        raise UserError(key, f"{pattern!r} matches the empty text", "let it need a character")
    if _nested(pattern):
        raise UserError(
            key,
            f"{pattern!r} repeats a group that repeats or chooses inside, which can take for ever",
            "write it without, or as several patterns",
        )
    return found


def _nested(pattern: str) -> bool:
    """Whether a quantified group (``?`` apart) contains a quantifier or an alternative: what makes backtracking exponential."""
    plain = re.sub(r"\\.", "a", pattern, flags=re.S)  # escapes
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "a", plain)  # sets of characters
    plain = re.sub(r"\(\?(?:[aiLmsux]+|#[^)]*|P=\w+)\)", "a", plain)  # flags, comments, references: no groups
    plain = re.sub(r"\(\?(?:P<\w+>|[aiLmsux-]*:|<?[=!]|>)", "(", plain)
    stack = [False]  # whether the group so far contains one, outermost first
    for position, character in enumerate(plain):
        if character == "(":
            stack.append(False)
        elif character == ")" and len(stack) > 1:
            inside = stack.pop()
            if inside and re.match(r"[*+]|\{\d*,?\d*\}", plain[position + 1 :]):
                return True
            stack[-1] |= inside
        elif character in "*+?|{":
            stack[-1] = True
    return False
