"""Captions that vary, against exact rates, hand-written outcomes and counts of words."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from defenses.base import Batch, Pool, RunContext
from defenses.captions import NUMBERS, Captions, CaptionsConfig
from defenses.commonwords import COMMON
from defenses.errors import UserError
from defenses.seeding import RecordRandom

OFF = {f"{name}_probability": 0.0 for name in ("several", "replace", "repeat", "insert", "noise")}
CAPTION = "chest film of the left side"


def make_batch(count, caption=CAPTION, more=None, step=3):
    random = RecordRandom(7, step, range(count), [0] * count)
    more = None if more is None else [list(more) for _ in range(count)]
    return Batch(
        torch.zeros(count, 1, 2, 2), np.arange(count), None, random, captions=[caption] * count, more_captions=more
    )


def captions_of(batch, **settings):
    return Captions(CaptionsConfig(**(OFF | settings))).change_batch(batch).captions


def context(captions, rows=None):
    rows = np.arange(len(captions)) if rows is None else np.array(rows)
    pool = Pool(np.zeros((len(captions), 1, 2, 2), np.uint8), rows, [""] * len(captions), [None] * len(captions))
    pool = Pool(**(vars(pool) | {"caption": captions}))
    return RunContext(pool, np.arange(0), 10, 4, 1, "fp32", 0, 5, False, Path(), Accelerator(cpu=True))


def within(count, trials, probability):
    """Whether a count lies within five standard deviations of its binomial mean."""
    return abs(count - trials * probability) < 5 * math.sqrt(trials * probability * (1 - probability))


def test_all_probabilities_zero_is_the_identity():
    batch = make_batch(8, more=["b"])
    changed = Captions(CaptionsConfig(**OFF)).change_batch(batch)
    assert changed.captions == batch.captions and changed.text_noise is None and changed.images is batch.images


@pytest.mark.parametrize("name", ["replace", "repeat", "insert"])
def test_each_change_happens_at_its_rate(name):
    changed = sum(caption != CAPTION for caption in captions_of(make_batch(2000), **{f"{name}_probability": 0.2}))
    assert within(changed, 2000, 0.2)  # random words that give the very caption back are too rare to count


def test_several_captions_are_equally_likely():
    """With probability p another draw among k: the first keeps 1 - p + p / k."""
    found = Counter(captions_of(make_batch(3000, "a", ["b", "c"]), several_probability=0.6))
    assert set(found) == {"a", "b", "c"}
    assert within(found["a"], 3000, 0.6) and within(found["b"], 3000, 0.2) and within(found["c"], 3000, 0.2)


def test_replacement_is_so_many_words_of_the_list_each_equally_likely():
    replaced = captions_of(make_batch(1000), replace_probability=1.0, replace_words=3, words=["x", "y", "z", "w"])
    assert all(len(caption.split()) == 3 for caption in replaced)
    found = Counter(" ".join(replaced).split())
    assert set(found) == set("xyzw") and all(within(number, 3000, 0.25) for number in found.values())


def test_replacement_by_captions_of_the_kept_training_records():
    defense = Captions(CaptionsConfig(**(OFF | {"replace_probability": 1.0, "replace_by": "captions"})))
    defense.begin(context(["one", None, "left out", "two", "two"], rows=[0, 1, 3, 4]))
    found = Counter(defense.change_batch(make_batch(1500)).captions)
    assert set(found) == {"one", "two"} and within(found["one"], 1500, 1 / 3)


def test_repetition_adds_words_of_the_caption_and_keeps_their_order():
    changed = captions_of(make_batch(800), repeat_probability=1.0, repeat_count=3)
    known, added = Counter(CAPTION.split()), Counter()
    for caption in changed:
        words = caption.split()
        left = iter(words)
        assert all(word in left for word in CAPTION.split())  # the caption is a subsequence
        extra = Counter(words) - known
        assert extra.total() == 3 and set(extra) <= set(known)
        added += extra
    assert all(within(number, 2400, 1 / 6) for number in added.values())


def test_inserted_words_stand_anywhere():
    """Before, between and behind the two words: three places, equally likely; the second word has four."""
    one = captions_of(make_batch(3000, "a b"), insert_probability=1.0, insert_count=1, words=["-", "-"])
    found = Counter(one)
    assert set(found) == {"- a b", "a - b", "a b -"} and all(within(n, 3000, 1 / 3) for n in found.values())
    two = Counter(captions_of(make_batch(3000, "a b"), insert_probability=1.0, insert_count=2, words=["-", "-"]))
    # places of the words of the caption among four: of the 12 equally likely insertions, 2 lead to each of the 6 outcomes
    assert len(two) == 6 and all(within(n, 3000, 1 / 6) for n in two.values())


def test_inserted_numbers_are_spread_over_their_range():
    changed = captions_of(make_batch(2000, "a"), insert_probability=1.0, insert_count=1, insert_kind="numbers")
    numbers = np.array([int(next(word for word in caption.split() if word != "a")) for caption in changed])
    assert numbers.min() >= 0 and numbers.max() < NUMBERS
    assert abs(numbers.mean() - NUMBERS / 2) < 5 * NUMBERS / math.sqrt(12 * 2000)
    assert within(int((numbers < NUMBERS / 4).sum()), 2000, 0.25)


def test_embedding_noise_has_its_rate_and_strength():
    batch = make_batch(2000)
    changed = Captions(CaptionsConfig(**(OFF | {"noise_probability": 0.3, "noise_std": 0.2}))).change_batch(batch)
    assert changed.captions == batch.captions and changed.text_noise.dtype == torch.float32
    assert set(changed.text_noise.tolist()) == {0.0, torch.tensor(0.2).item()}
    assert within(int((changed.text_noise > 0).sum()), 2000, 0.3)
    batch.text_noise = torch.full((2000,), 0.15)
    both = Captions(CaptionsConfig(**(OFF | {"noise_probability": 1.0, "noise_std": 0.2}))).change_batch(batch)
    assert torch.allclose(both.text_noise, torch.tensor(0.25))  # variances add


def test_a_record_without_a_caption_stays_without():
    settings = {f"{name}_probability": 1.0 for name in ("several", "replace", "repeat", "insert", "noise")}
    changed = Captions(CaptionsConfig(**settings)).change_batch(make_batch(50, ""))
    assert changed.captions == [""] * 50 and not changed.text_noise.any()


def test_what_happens_to_a_record_depends_on_nothing_else():
    """Not on the batch around it, nor on other changes; on the step it does."""
    settings = {"replace_probability": 0.3, "insert_probability": 0.5}
    whole = captions_of(make_batch(40), **settings)
    part = captions_of(make_batch(40)[30:], **settings)
    assert whole[30:] == part and whole != captions_of(make_batch(40, step=4), **settings)
    both = captions_of(make_batch(40), **settings, repeat_probability=0.5)
    alone = captions_of(make_batch(40), repeat_probability=0.5)
    same = [place for place, caption in enumerate(alone) if caption == CAPTION]
    assert 5 < len(same) < 35 and [both[place] for place in same] == [whole[place] for place in same]


def test_changes_are_independent_of_each_other():
    words = {"insert_count": 1, "insert_kind": "numbers", "repeat_count": 1}
    changed = captions_of(make_batch(2000, "a"), insert_probability=0.5, repeat_probability=0.5, **words)
    both = sum(caption.split().count("a") == 2 and len(caption.split()) == 3 for caption in changed)
    assert within(both, 2000, 0.25)


def test_the_first_caption_and_the_images_are_left_in_the_batch():
    batch = make_batch(4, "a", ["b"])
    Captions(CaptionsConfig()).change_batch(batch)
    assert batch.captions == ["a"] * 4 and batch.more_captions == [["b"]] * 4


def test_only_other_records_captions_make_it_remember():
    assert not Captions(CaptionsConfig()).remembers and not Captions(CaptionsConfig(replace_by="words")).remembers
    assert Captions(CaptionsConfig(replace_by="captions")).remembers
    assert not Captions(CaptionsConfig(replace_by="captions", replace_probability=0.0)).remembers


def test_built_in_words_are_distinct():
    assert len(COMMON) == len(set(COMMON)) > 350 and all(word.isalpha() and word.islower() for word in COMMON)


def test_without_captions_it_refuses():
    with pytest.raises(UserError, match=r"data\.caption_key"):
        Captions(CaptionsConfig()).begin(context([None, ""]))
    batch = make_batch(2)
    batch.captions = None
    with pytest.raises(UserError, match="not told any captions"):
        Captions(CaptionsConfig()).change_batch(batch)


@pytest.mark.parametrize(
    "settings",
    [
        {"several_probability": 1.1},
        {"noise_probability": -0.1},
        {"noise_std": 11.0},
        {"insert_count": 0},
        {"repeat_count": 33},
        {"replace_words": 0},
        {"words": ["one"]},
        {"words": ["one", " "]},
    ],
)
def test_mistakes_name_their_key(settings):
    with pytest.raises(UserError, match=rf"defenses\.captions\.{next(iter(settings))}"):
        CaptionsConfig(**settings)
