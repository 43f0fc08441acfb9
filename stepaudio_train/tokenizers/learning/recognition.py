"""Recognition of words or characters by CTC: the labels, the head's loss, greedy reading, and the error rate."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio_train.tokenizers.learning.corpus import ClipFeatures, sorted_batches
from stepaudio_train.tokenizers.learning.optimisation import Term

BLANK = 0
_BATCH_S = 60.0

Recognise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(features [B, T, M], frames [B]) -> (logits [B, places, labels], places [B])."""

MOST_WORDS = 200
"""A corpus of no more different words than this is read word by word: a small corpus of few words teaches whole words
several times as fast as it teaches spelling. Larger vocabularies are spelt."""


class Alphabet:
    """What transcripts are made of: words where there are few, else characters. Label 0 is the blank."""

    def __init__(self, transcripts: Sequence[str]) -> None:
        words = {word for text in transcripts for word in words_of(text)}
        self._spelt = len(words) > MOST_WORDS
        self._units = sorted({c for text in transcripts for c in normalise_transcript(text)} if self._spelt else words)
        self._labels = {unit: index for index, unit in enumerate(self._units, start=1)}

    @property
    def num_labels(self) -> int:
        """With the blank."""
        return len(self._units) + 1

    @property
    def labels_per_token(self) -> int:
        """Places for a label that a recogniser needs per token: fast speech has more than 16.7 characters/s, and never
        as many words."""
        return 2 if self._spelt else 1

    def encode(self, transcript: str) -> list[int]:
        """Labels of a transcript; what is not in the alphabet is left out."""
        units = normalise_transcript(transcript) if self._spelt else words_of(transcript)
        return [self._labels[unit] for unit in units if unit in self._labels]

    def decode(self, labels: Sequence[int]) -> str:
        """Text of labels without blanks."""
        return ("" if self._spelt else " ").join(self._units[label - 1] for label in labels)


def normalise_transcript(text: str) -> str:
    """Lower case, compatible Unicode forms, no punctuation, single spaces."""
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = (c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in folded)
    return " ".join("".join(kept).split())


def words_of(text: str) -> list[str]:
    """What errors are counted in: words, but each character of scripts written without spaces (CJK)."""
    spaced = "".join(f" {c} " if _is_wide(c) else c for c in normalise_transcript(text))
    return spaced.split()


def ctc_loss(logits: Tensor, lengths: Tensor, labels: Sequence[Sequence[int]]) -> Tensor:
    """`ctc_term` per label: a scalar in nats."""
    term = ctc_term(logits, lengths, labels)
    return term.total / max(1, term.count)


def ctc_term(logits: Tensor, lengths: Tensor, labels: Sequence[Sequence[int]]) -> Term:
    """CTC loss in nats, summed over the batch and its labels. Clips too short for their text count nothing.

    Args:
        logits: [B, T, labels]; lengths: [B] places of each clip; labels: without blanks, B sequences.
    """
    sizes = torch.tensor([len(sequence) for sequence in labels])
    targets = torch.tensor([label for sequence in labels for label in sequence], device=logits.device)
    log_probs = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    total = F.ctc_loss(log_probs, targets, lengths.cpu(), sizes, BLANK, reduction="sum", zero_infinity=True)
    return Term(total, int(sizes.sum()))


def greedy(logits: Tensor, lengths: Tensor) -> list[list[int]]:
    """Best label at each place, repeats and blanks taken out: B sequences."""
    readings = []
    for row, length in zip(logits.argmax(dim=-1).tolist(), lengths.tolist(), strict=True):
        best = row[:length]
        readings.append([c for i, c in enumerate(best) if c != BLANK and (i == 0 or c != best[i - 1])])
    return readings


def read_clips(recognise: Recognise, alphabet: Alphabet, data: ClipFeatures) -> list[str]:
    """What a recogniser reads in each clip, greedily, in the clips' order."""
    texts = [""] * len(data.texts)
    for indices in sorted_batches(data, _BATCH_S):
        for index, labels in zip(indices, greedy(*recognise(*data.stack(indices))), strict=True):
            texts[index] = alphabet.decode(labels)
    return texts


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Percent of word errors over the whole set (`words_of`)."""
    import jiwer

    pairs = [(" ".join(words_of(r)), " ".join(words_of(h))) for r, h in zip(references, hypotheses, strict=True)]
    spoken = [(r, h) for r, h in pairs if r]
    return 100.0 * jiwer.wer([r for r, _ in spoken], [h for _, h in spoken])


def _is_wide(character: str) -> bool:
    return unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) == "W"
