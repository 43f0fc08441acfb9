"""The dual codebook: linguistic and semantic codes as one stream, 2 + 3 for every 0.12 s (paper 3.1).

Group g is `L[2g] L[2g+1] S[3g] S[3g+1] S[3g+2]`. The shorter stream sets the number of groups and what is left over
is dropped, as the released inference code does. Ids are those of a `Vocabulary`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepaudio_train.config.schema import SpeechLayout
from stepaudio_train.tokenizers.vocabulary import Vocabulary

LINGUISTIC_PER_GROUP = 2
SEMANTIC_PER_GROUP = 3
TOKENS_PER_GROUP = LINGUISTIC_PER_GROUP + SEMANTIC_PER_GROUP
GROUP_SAMPLES = 1920
"""Samples at 16 kHz that one group stands for: 0.12 s."""

_AUDIO_TEXT = re.compile(r"<audio_(\d+)>")


def num_groups(num_linguistic: int, num_semantic: int) -> int:
    """Whole groups in two streams."""
    return min(num_linguistic // LINGUISTIC_PER_GROUP, num_semantic // SEMANTIC_PER_GROUP)


def merge_streams(linguistic: ArrayLike, semantic: ArrayLike, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Codes of one clip -> vocabulary ids [5 * groups]; empty where either stream has no whole group.

    Args:
        linguistic: [L] codes from 0; semantic: [S] codes from 0.

    Raises:
        ValueError: a code outside its codebook.
    """
    first = _checked(linguistic, vocabulary.linguistic_size, "linguistic")
    second = _checked(semantic, vocabulary.semantic_size, "semantic")
    groups = num_groups(len(first), len(second))
    left = first[: groups * LINGUISTIC_PER_GROUP].reshape(groups, LINGUISTIC_PER_GROUP) + vocabulary.linguistic_offset
    right = second[: groups * SEMANTIC_PER_GROUP].reshape(groups, SEMANTIC_PER_GROUP) + vocabulary.semantic_offset
    return np.concatenate([left, right], axis=1).reshape(-1)


def split_streams(ids: ArrayLike, vocabulary: Vocabulary) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Undo `merge_streams`: vocabulary ids -> linguistic [2 * groups] and semantic [3 * groups] codes from 0.

    A last group that is not whole, as a generation cut short leaves it, is dropped.

    Raises:
        ValueError: an id that is no audio id, or not of the kind its place in the group asks for.
    """
    stream = _as_ids(ids)
    place = np.arange(len(stream)) % TOKENS_PER_GROUP
    is_linguistic = (stream >= vocabulary.linguistic_offset) & (stream < vocabulary.semantic_offset)
    is_semantic = (stream >= vocabulary.semantic_offset) & (stream < vocabulary.audio_end)
    wrong = np.flatnonzero(np.where(place < LINGUISTIC_PER_GROUP, ~is_linguistic, ~is_semantic))
    if len(wrong):
        at = int(wrong[0])
        kind = "linguistic" if place[at] < LINGUISTIC_PER_GROUP else "semantic"
        raise ValueError(
            f"id {stream[at]} at position {at} should be {kind}: audio goes two linguistic ids "
            f"({vocabulary.linguistic_offset}..{vocabulary.semantic_offset - 1}), then three semantic ids "
            f"({vocabulary.semantic_offset}..{vocabulary.audio_end - 1})"
        )
    whole = stream[: len(stream) // TOKENS_PER_GROUP * TOKENS_PER_GROUP].reshape(-1, TOKENS_PER_GROUP)
    linguistic = whole[:, :LINGUISTIC_PER_GROUP].reshape(-1) - vocabulary.linguistic_offset
    return linguistic, whole[:, LINGUISTIC_PER_GROUP:].reshape(-1) - vocabulary.semantic_offset


def in_layout(ids: NDArray[np.int64], layout: SpeechLayout) -> NDArray[np.int64]:
    """Merged ids [5 * groups] in another layout: the same tokens, or one stream of them, in another order."""
    groups = ids.reshape(-1, TOKENS_PER_GROUP)
    linguistic, semantic = groups[:, :LINGUISTIC_PER_GROUP].reshape(-1), groups[:, LINGUISTIC_PER_GROUP:].reshape(-1)
    if layout == "linguistic":
        return linguistic
    if layout == "semantic":
        return semantic
    return np.concatenate([linguistic, semantic]) if layout == "sequential" else ids


def audio_ids_to_text(ids: ArrayLike, vocabulary: Vocabulary) -> str:
    """Text form of audio ids: `<audio_k>` each, k = id - text_size.

    Raises:
        ValueError: an id that is neither linguistic nor semantic.
    """
    stream = _as_ids(ids)
    outside = np.flatnonzero((stream < vocabulary.linguistic_offset) | (stream >= vocabulary.audio_end))
    if len(outside):
        raise ValueError(
            f"id {stream[outside[0]]} at position {outside[0]} is no audio id: those are "
            f"{vocabulary.linguistic_offset}..{vocabulary.audio_end - 1}"
        )
    return "".join(f"<audio_{index - vocabulary.text_size}>" for index in stream.tolist())


def audio_text_to_ids(text: str, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Ids of a text that holds nothing but `<audio_k>`.

    Raises:
        ValueError: anything else in the text, or a k beyond the codebooks.
    """
    leftover = _AUDIO_TEXT.sub("", text).strip()
    if leftover:
        raise ValueError(f"expected nothing but <audio_k> tokens, found {leftover[:40]!r}")
    numbers = [int(number) for number in _AUDIO_TEXT.findall(text)]
    limit = vocabulary.linguistic_size + vocabulary.semantic_size
    for number in numbers:
        if number >= limit:
            raise ValueError(f"<audio_{number}> is no audio token: the last one is <audio_{limit - 1}>")
    return np.asarray(numbers, dtype=np.int64) + vocabulary.text_size


def _as_ids(ids: ArrayLike | Sequence[int]) -> NDArray[np.int64]:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"expected a flat list of integers, got shape {array.shape} of {array.dtype}")
    return array.astype(np.int64)


def _checked(codes: ArrayLike, size: int, name: str) -> NDArray[np.int64]:
    array = _as_ids(codes)
    outside = np.flatnonzero((array < 0) | (array >= size))
    if len(outside):
        raise ValueError(f"{name} code {array[outside[0]]} at position {outside[0]} is outside 0..{size - 1}")
    return array
