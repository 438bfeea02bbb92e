"""A CLIP tokenizer learnt from captions: byte-level byte-pair encoding (Radford et al. 2021, "CLIP", section 2.4).

The vocabulary is laid out like CLIP's: 256 bytes, the same at the end of a word, the learnt merges, begin, end. Every text
can be written in it, in any language; what the captions never contained costs more tokens. It holds pieces of the captions
that occur at least twice (`LEAST_OCCURRENCES`), words and names among them, in plain text.
"""

import json
from collections.abc import Sequence

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from defenses.errors import UserError

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
LONGEST, SHORTEST = 77, 16  # tokens with begin and end; 77 is the length of CLIP's text encoder
ROOM = 8  # tokens beyond the longest caption, for words that a defense inserts or a user adds
BASE = 2 * 256 + 2  # tokens of a vocabulary without merges
LEAST_OCCURRENCES = 2  # of a merge in the captions
KEY = "data.caption_key"


def learn(captions: Sequence[str | None], size: int) -> CLIPTokenizer:
    """Learns at most ``size`` tokens. The same captions in the same or another order give the same tokenizer.

    ``model_max_length`` is `ROOM` more than the longest caption with begin and end takes, between `SHORTEST` and `LONGEST`;
    longer ones are cut by whoever tokenizes with ``truncation=True``.

    Args:
        captions: of the training records; None and empty ones are passed over.
        size: of the vocabulary, at least `BASE`.

    Raises:
        UserError: no caption says anything, or one is not text.
    """
    texts = _usable(captions)
    merges = _merges(texts, size - BASE)
    letters = [*_alphabet(), *(letter + WORD_END for letter in _alphabet())]
    tokens = [*letters, *(first + second for first, second in merges), BEGIN, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    words = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LONGEST)
    longest = max(len(encoding) for encoding in words.backend_tokenizer.encode_batch(texts))
    words.model_max_length = min(max(longest + ROOM, SHORTEST), LONGEST)
    return words


def _usable(captions: Sequence[str | None]) -> list[str]:
    """The captions that say something, each once, in a fixed order."""
    if all(caption is None for caption in captions):
        raise UserError(KEY, "no training record has a caption", "name the column that holds the captions")
    texts = {caption.strip() for caption in captions if caption is not None}
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(KEY, f"{text[:60]!a} is not valid Unicode text", "mend this caption") from error
    if texts == {""}:
        raise UserError(KEY, "all captions are empty", "a text-to-image model needs captions, another family none")
    return sorted(texts - {""})


def _merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """At most ``count`` merges in the order in which they were learnt."""
    if count < 0:
        raise ValueError(f"a vocabulary has at least {BASE} tokens")
    learner = CLIPTokenizer(vocab={END: 0}, merges=[]).backend_tokenizer
    # the trainer would number letters at the end of words in the order of a hash table, and break ties by that number
    numbered = [letter + WORD_END for letter in _alphabet()]
    trainer = BpeTrainer(
        vocab_size=count + BASE,
        min_frequency=LEAST_OCCURRENCES,
        special_tokens=numbered,
        initial_alphabet=_alphabet(),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(pair) for pair in learnt[:count]]


def _alphabet() -> list[str]:
    """One printable letter for each of the 256 bytes."""
    return sorted(ByteLevel.alphabet())
