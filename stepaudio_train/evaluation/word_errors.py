"""Word error rate, with Mandarin counted by characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

# The ideographs, and the kana that Japanese writes between them.
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ffff])")


@dataclass(frozen=True)
class ErrorRate:
    """Errors over the whole corpus: their sum by the number of reference words, not a mean over utterances."""

    percent: float
    num_words: int
    """In the references."""
    substitutions: int
    deletions: int
    insertions: int


def normalise(text: str) -> str:
    """Lower case, no punctuation, words apart by one space; every ideograph is a word, as in a character error rate."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = _IDEOGRAPH.sub(r" \1 ", text)
    # Apostrophes and hyphens inside a word belong to it.
    text = re.sub(r"(?<!\w)['’-]|['’-](?!\w)|[^\w\s'’-]|_", " ", text)
    return " ".join(text.split())


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Compare transcripts after `normalise`.

    Raises:
        ValueError: no references, a reference without words, or unequal numbers.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, but {len(hypotheses)} hypotheses")
    truth = [normalise(text) for text in references]
    empty = [index for index, text in enumerate(truth) if not text]
    if not truth or empty:
        raise ValueError(f"reference {empty[0]} has no words" if empty else "there are no references")
    counted = jiwer.process_words(truth, [normalise(text) for text in hypotheses])
    num_words = counted.hits + counted.substitutions + counted.deletions
    return ErrorRate(100 * counted.wer, num_words, counted.substitutions, counted.deletions, counted.insertions)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """As `word_error_rate`, with every letter a word; spaces do not count."""
    return word_error_rate([_spelt(text) for text in references], [_spelt(text) for text in hypotheses])


def _spelt(text: str) -> str:
    return " ".join(normalise(text).replace(" ", ""))
