"""A tokenizer learnt from captions."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from transformers import CLIPTokenizer

from defenses.errors import UserError
from train.vocabulary import BASE, BEGIN, END, LONGEST, ROOM, SHORTEST, learn

CAPTIONS = [
    "Chest X-ray of a 54 year old, left lung clear",
    "chest x-ray, left lung opaque",
    "Röntgenbild des Thorax, rechts unauffällig",
    "胸部X線写真",
    "red apple 🍎 on white",
]
TIES = [f"{first}{second} {first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]


def merges_by_hand(words: list[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding by the book (Sennrich et al. 2016, algorithm 1); ties are the caller's to avoid."""
    texts = Counter((*word[:-1], f"{word[-1]}</w>") for word in words)
    learnt = []
    for _ in range(count):
        pairs = Counter()
        for parts, times in texts.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += times
        ranked = pairs.most_common(2)
        assert len(ranked) == 1 or ranked[0][1] > ranked[1][1], "this example has a tie"
        best = ranked[0][0]
        learnt.append(best)
        texts = Counter({_joined(parts, best): times for parts, times in texts.items()})
    return learnt


def _joined(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out, place = [], 0
    while place < len(parts):
        both = parts[place : place + 2] == pair
        out.append("".join(pair) if both else parts[place])
        place += 2 if both else 1
    return tuple(out)


def test_the_merges_are_those_of_the_algorithm():
    words = ["lower"] * 9 + ["low"] * 5 + ["lowest"] * 4 + ["newer"] * 2
    expected = merges_by_hand(words, 4)
    captions = [" ".join(words[:3]) + f" {number}" for number in range(3)]  # all different, together 9 x lower
    captions += ["low " * 5, "lowest " * 4, "newer " * 2]
    vocabulary = learn(captions, BASE + 4).get_vocab()
    learnt = sorted(vocabulary, key=vocabulary.get)[512:-2]
    assert learnt == ["".join(pair) for pair in expected]


def test_the_vocabulary_is_laid_out_like_that_of_clip():
    words = learn(CAPTIONS, BASE + 30)
    assert len(words) <= BASE + 30
    assert (words.bos_token, words.eos_token, words.pad_token, words.unk_token) == (BEGIN, END, END, END)
    assert (words.bos_token_id, words.eos_token_id) == (len(words) - 2, len(words) - 1)
    assert words("lung").input_ids[0] == words.bos_token_id and words("lung").input_ids[-1] == words.eos_token_id
    assert words("").input_ids == [words.bos_token_id, words.eos_token_id]


def test_any_text_comes_back_and_case_does_not_matter(tmp_path):
    learn(CAPTIONS, 600).save_pretrained(tmp_path)
    words = CLIPTokenizer.from_pretrained(tmp_path)
    for text in [*CAPTIONS, "never seen: Ωmega, العربية, हिन्दी, 👩🏽‍🚀, ﬁ ligature", "tab\tand\nline", "\x00 zero"]:
        tokens = words(text).input_ids
        assert END not in words.convert_ids_to_tokens(tokens[1:-1]), "an unknown token loses text"
        assert _plain(words.decode(tokens, skip_special_tokens=True)) == _plain(text)
        assert words(text.upper()).input_ids == words(text.upper().lower()).input_ids


def _plain(text: str) -> str:
    return re.sub(r"\s+", "", text.lower())


def test_a_saved_tokenizer_is_the_same_one(tmp_path):
    words = learn(CAPTIONS, 600)
    words.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == words.get_vocab() and again.model_max_length == words.model_max_length
    assert [again(text).input_ids for text in CAPTIONS] == [words(text).input_ids for text in CAPTIONS]


def test_the_order_of_captions_and_the_process_do_not_matter():
    """Hash tables of the library are seeded anew in every process; all pairs here occur equally often."""
    code = "from tests.test_vocabulary import TIES, table; print(table(TIES))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == f"{table(TIES)}\n"
    assert table(TIES[::-1]) == table(TIES)


def table(captions: list[str]) -> list[tuple[str, int]]:
    return sorted(learn(captions, BASE + 8).get_vocab().items())


@pytest.mark.parametrize(("count", "length"), [(1, SHORTEST), (20, 20 + 2 + ROOM), (200, LONGEST)])
def test_the_longest_caption_decides_on_the_length(count, length):
    words = learn(["word " * 30, "word " * count], BASE + 40) if count > 30 else learn(["word " * count], BASE + 40)
    assert words.model_max_length == length
    cut = words("word " * 300, truncation=True, padding="max_length").input_ids
    assert len(cut) == length and cut[-1] == words.eos_token_id


def test_long_and_missing_captions_are_no_trouble():
    assert learn(["a" * 5_000, None, "", "ab ab"], BASE + 5).model_max_length == LONGEST


@pytest.mark.parametrize(
    ("captions", "problem"),
    [
        ([], "no training record has a caption"),
        ([None, None], "no training record has a caption"),
        (["", " \n"], "all captions are empty"),
        ([None, ""], "all captions are empty"),
        (["fine", "broken \ud800"], r"'broken \\ud800' is not valid Unicode text"),
    ],
)
def test_captions_that_say_nothing_are_refused(captions, problem):
    with pytest.raises(UserError, match=f"data.caption_key: {problem}"):
        learn(captions, 600)
