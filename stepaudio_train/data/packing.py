"""From rendered documents to packed rows: which documents share a row, and the tensors of a row."""

from __future__ import annotations

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

    def content(self) -> bytes:
        """All that is learned from, to tell data by."""
        return len(self).to_bytes(4, "little") + self.ids.tobytes() + self.loss_weights.tobytes()


def choose_row(lengths: Sequence[int], capacity: int) -> list[int]:
    """Which of the waiting documents share the next row: the first, and those others that leave the least room.

    The best filling is found exactly (subset sums, kept as bits of integers), and among equally good ones the earliest
    documents are taken. So no document waits longer than there are others before it, and rows are as good as full
    whenever a few dozen documents wait.

    Args:
        lengths: of the waiting documents, oldest first; the first must fit.
        capacity: tokens of a row.

    Returns:
        Indices into `lengths`, ascending.
    """
    room = capacity - lengths[0]
    mask = (1 << (room + 1)) - 1
    # Bit n of reachable[i]: some of the documents 1..i make up n tokens.
    reachable = [1]
    for length in lengths[1:]:
        sums = reachable[-1]
        reachable.append(sums | (sums << length) & mask if length <= room else sums)
        if reachable[-1] >> room:
            break
    filled = reachable[-1].bit_length() - 1
    chosen = []
    for index in range(len(reachable) - 1, 0, -1):
        if not reachable[index - 1] >> filled & 1:
            chosen.append(index)
            filled -= lengths[index]
    return [0, *reversed(chosen)]


def choose_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows for a finite set of documents, as indices into `lengths`; the last rows hold what was left."""
    waiting = list(range(len(lengths)))
    rows = []
    while waiting:
        chosen = choose_row([lengths[i] for i in waiting], capacity)
        rows.append([waiting[i] for i in chosen])
        taken = set(chosen)
        waiting = [item for i, item in enumerate(waiting) if i not in taken]
    return rows


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
