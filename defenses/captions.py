"""Captions that vary (seam 2): the text that a picture is trained with changes from one time to the next (Somepalli et al. 2023).

A caption that occurs with one picture alone is a key to it: much of what text-to-image models replicate comes out through the very
caption, and varying it lowers replication (Somepalli et al. 2023, "Understanding and Mitigating Copying in Diffusion
Models"). One random stream per record, step and change (`defenses.seeding`): switching one off leaves the others as they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from defenses.base import Batch, Defense, RunContext
from defenses.commonwords import COMMON
from defenses.errors import UserError
from defenses.seeding import RecordRandom

NUMBERS = 100_000  # inserted numbers lie below it, as in the authors' code
LIMITS = {"replace_words": 32, "insert_count": 32, "repeat_count": 32}


@dataclass(kw_only=True)
class CaptionsConfig:
    """Settings of `Captions`: a probability of 0 turns a change off. Probabilities and counts are those of the authors' training code.

    The changes are made in the order of the fields, each independently of the others. The authors tried them one at a time.
    """

    several_probability: float = 1.0  # take any caption of the picture, each equally likely, in place of its first
    replace_probability: float = 0.1  # put random text in the caption's place
    # words: from `words`; captions: the first caption of another training record, which a private run refuses
    replace_by: Literal["words", "captions"] = "words"
    replace_words: int = 4  # how many, 1 to 32; only for replace_by=words
    repeat_probability: float = 0.1  # put words of the caption once more at random places
    repeat_count: int = 2  # how many, 1 to 32
    insert_probability: float = 0.1  # put random words or numbers at random places
    insert_kind: Literal["words", "numbers"] = "words"  # numbers: 0 to 99999; they change the meaning least
    insert_count: int = 2  # how many, 1 to 32
    noise_probability: float = 0.0  # add Gaussian noise to the text embedding
    noise_std: float = (
        0.1  # of that noise, in units of the embedding's own standard deviation, 0 to 10; the authors try up to 1
    )
    # what random words are drawn from; null: common English words (`defenses.commonwords`). Must not be taken from private records
    words: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("several", "replace", "repeat", "insert", "noise"):
            key, value = f"{name}_probability", getattr(self, f"{name}_probability")
            if not 0 <= value <= 1:
                raise UserError(f"defenses.captions.{key}", f"{value} is no probability", "0 to 1")
        for key, high in LIMITS.items():
            if not 1 <= getattr(self, key) <= high:
                raise UserError(f"defenses.captions.{key}", f"{getattr(self, key)} is out of range", f"1 to {high}")
        if not 0 <= self.noise_std <= 10:
            raise UserError("defenses.captions.noise_std", f"{self.noise_std} is out of range", "0 to 10")
        if self.words is not None and (len(self.words) < 2 or any(not word.strip() for word in self.words)):
            raise UserError("defenses.captions.words", "needs at least two words, none of them blank", "null: built in")


class Captions(Defense):
    """Several captions, replacement, repetition, insertion and embedding noise, in this order; all probabilities 0: the identity.

    A record without a caption (the empty text) stays as it is: it teaches the model what it draws without a prompt.
    """

    name = "captions"
    needs_captions = True

    def __init__(self, config: CaptionsConfig):
        self.config = config
        self._words = list(config.words) if config.words is not None else list(COMMON)
        self._others: list[str] = []

    @property
    def remembers(self) -> bool:
        """Other records' captions take part in a record's gradient."""
        return self.config.replace_probability > 0 and self.config.replace_by == "captions"

    def begin(self, context: RunContext) -> None:
        """Keeps the captions that others may be replaced by.

        Raises:
            UserError: no training record has a caption.
        """
        captions = [context.pool.caption[row] for row in context.pool.rows] if context.pool.caption else []
        captions = [caption for caption in captions if caption]
        if not captions:
            raise UserError(
                "defenses.captions", "no training record has a caption", "set data.caption_key, or switch it off"
            )
        self._others = captions if self.remembers else []

    def change_batch(self, batch: Batch) -> Batch:
        """Changed captions, and ``text_noise``, float32 [B], where noise is on; the images are the same tensor.

        Raises:
            UserError: the model is not told any captions.
        """
        if batch.captions is None:
            raise UserError("defenses.captions", "the model is not told any captions", "switch it off")
        if len(batch) == 0:
            return batch
        captions = self._several(batch.captions, batch.more_captions, batch.random)
        captions = self._replace(captions, batch.random)
        captions = self._repeat(captions, batch.random)
        captions = self._insert(captions, batch.random)
        return replace(batch, captions=captions, text_noise=self._noise(batch, captions))

    def _several(self, captions: list[str], more: Sequence[Sequence[str]] | None, random: RecordRandom) -> list[str]:
        choices = [[caption, *others] for caption, others in zip(captions, more or [[]] * len(captions), strict=True)]
        draws = _draw(random, "several", self.config.several_probability, 1)
        return [
            choice[0] if draw is None else choice[int(draw[0] * len(choice))]
            for choice, draw in zip(choices, draws, strict=True)
        ]

    def _replace(self, captions: list[str], random: RecordRandom) -> list[str]:
        config = self.config
        by_words = config.replace_by == "words"
        draws = _draw(random, "replace", config.replace_probability, config.replace_words if by_words else 1)
        source = self._words if by_words else self._others
        return [
            " ".join(_choose(source, number) for number in draw) if caption and draw is not None else caption
            for caption, draw in zip(captions, draws, strict=True)
        ]

    def _repeat(self, captions: list[str], random: RecordRandom) -> list[str]:
        """Words are those of the caption before any of them was repeated."""
        draws = _draw(random, "repeat", self.config.repeat_probability, 2 * self.config.repeat_count)
        return [
            _scatter(caption, [_choose(caption.split(), number) for number in draw[0::2]], draw[1::2])
            if caption and draw is not None
            else caption
            for caption, draw in zip(captions, draws, strict=True)
        ]

    def _insert(self, captions: list[str], random: RecordRandom) -> list[str]:
        numbers = self.config.insert_kind == "numbers"
        draws = _draw(random, "insert", self.config.insert_probability, 2 * self.config.insert_count)
        inserted = []
        for caption, draw in zip(captions, draws, strict=True):
            if caption and draw is not None:
                words = [str(int(u * NUMBERS)) if numbers else _choose(self._words, u) for u in draw[0::2]]
                caption = _scatter(caption, words, draw[1::2])
            inserted.append(caption)
        return inserted

    def _noise(self, batch: Batch, captions: list[str]) -> torch.Tensor | None:
        """Standard deviation of each record's embedding noise; what an earlier defense has set is kept in variance."""
        if self.config.noise_probability == 0:
            return batch.text_noise
        draws = _draw(batch.random, "noise", self.config.noise_probability, 0)
        hit = [bool(caption) and draw is not None for caption, draw in zip(captions, draws, strict=True)]
        std = torch.tensor(hit, dtype=torch.float32) * self.config.noise_std
        std = std.to(batch.images.device)
        return std if batch.text_noise is None else torch.hypot(batch.text_noise, std)

    def claim(self) -> dict[str, Any]:
        return {
            "kind": "heuristic",
            "statement": "Varies the text that a picture is trained with, so that no caption is the one key to its picture "
            "(Somepalli et al. 2023). No guarantee: a picture that is repeated often, or that the model memorises without any text, "
            "may still come out, under its original caption too.",
        }


def _draw(random: RecordRandom, name: str, probability: float, count: int) -> list[list[float] | None]:
    """``count`` uniform numbers in [0, 1) for each record that is changed; None for the others."""
    if probability == 0:
        return [None] * len(random)
    numbers = random.uniform(f"captions/{name}", 1 + count)
    return [row[1:] if row[0] < probability else None for row in numbers.double().tolist()]


def _choose(values: Sequence[str], number: float) -> str:
    return values[int(number * len(values))]


def _scatter(caption: str, added: list[str], places: list[float]) -> str:
    """Puts words one after the other between, before or after those that are there, by uniform numbers."""
    words = caption.split()
    for word, place in zip(added, places, strict=True):
        words.insert(int(place * (len(words) + 1)), word)
    return " ".join(words)
