"""From rendered documents to packed rows: which documents share a row, and the tensors of a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.tokenizers.vocabulary import PAD_ID


@dataclass(frozen=True)
class Document:
    """One rendered sample: what the model reads and which of it it learns to predict."""

    ids: np.ndarray
    """[n] int32."""
    loss_weights: np.ndarray
    """[n] float32: weight of predicting this id from those before it. The first is never predicted."""
    task: int
    """Index in data.batch.TASKS."""

    def __len__(self) -> int:
        return len(self.ids)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group items into bins of `capacity`: longest first, each into the fullest bin it fits in.

    Returns indices into `lengths`, a list for each bin, bins in the order they were opened. Deterministic.

    Raises:
        ValueError: an item is longer than a bin.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"a document of {length} tokens does not fit a row of {capacity}")
        place = bisect_left(open_bins, (length, -1))
        if place < len(open_bins):
            room, index = open_bins.pop(place)
        else:
            room, index = capacity, len(bins)
            bins.append([])
        bins[index].append(item)
        if room > length:
            insort(open_bins, (room - length, index))
    return bins


def pack_rows(rows: Sequence[Sequence[Document]], sequence_length: int) -> TokenBatch:
    """Lay documents one behind the other, a list for each row, and pad every row to `sequence_length` tokens.

    Raises:
        ValueError: a row's documents are together longer than the row.
    """
    shape = (len(rows), sequence_length)
    input_ids = np.full(shape, PAD_ID, np.int64)
    targets = np.full(shape, PAD_ID, np.int64)
    loss_weights = np.zeros(shape, np.float32)
    documents = np.zeros(shape, np.int32)
    tasks = np.zeros(shape, np.int8)
    for r, row in enumerate(rows):
        start = 0
        for index, document in enumerate(row):
            end = start + len(document)
            if end > sequence_length:
                total = sum(len(d) for d in row)
                raise ValueError(f"documents of {total} tokens in a row of {sequence_length}")
            input_ids[r, start:end] = document.ids
            targets[r, start : end - 1] = document.ids[1:]
            loss_weights[r, start : end - 1] = document.loss_weights[1:]
            documents[r, start:end] = index
            tasks[r, start:end] = document.task
            start = end
        documents[r, start:] = len(row)
    return TokenBatch(*(torch.from_numpy(a) for a in (input_ids, targets, loss_weights, documents, tasks)))
