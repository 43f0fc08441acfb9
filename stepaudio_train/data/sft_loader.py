"""Batches for fine-tuning: what is in memory, gone through in epochs, the same at any data-parallel size.

In memory are documents, or pairs of them that have to lie in one row (`data/preferences.py`). An epoch is every one
once: in an order drawn from (seed, epoch), packed into rows, and cut into global batches. The last batch of an epoch
may hold empty rows, so that none is seen more often than another.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.packing import choose_row, choose_rows, pack_rows

_STATE_FILE = "conversations.json"
_WAITING_DOCUMENTS = 512
"""Packed at a time. A few dozen fill rows well already, and the work grows with every one."""


class Packable(Protocol):
    """What lies in one row as a whole."""

    def __len__(self) -> int:
        """In tokens."""

    def content(self) -> bytes:
        """All that is learned from, to tell data by."""


P = TypeVar("P", bound=Packable)
Pack = Callable[[Sequence[Sequence[P]], int], TokenBatch]
"""(what lies in each row, tokens of a row) -> the rows."""


class SftLoader(Generic[P]):
    """See `data.loader.TrainLoader`."""

    def __init__(
        self,
        documents: Sequence[P],
        sequence_length: int,
        rows_per_step: int,
        seed: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        pack: Pack[P] = pack_rows,
    ) -> None:
        """Draw the first epoch.

        Args:
            documents: or what else `pack` lays into rows.
            rows_per_step: rows of the global batch, over all data-parallel ranks. Rank r gets the r-th equal run of
                them.

        Raises:
            ValueError: no document, one longer than a row, or rows that the ranks cannot share evenly.
        """
        longest = max((len(document) for document in documents), default=0)
        if not 0 < longest <= sequence_length:
            raise ValueError(f"{len(documents)} documents of up to {longest} tokens in rows of {sequence_length}")
        self._own = _rows_of_rank(rows_per_step, data_parallel_rank, data_parallel_size)
        self._documents, self._sequence_length = documents, sequence_length
        self._rows_per_step, self._seed, self._pack = rows_per_step, seed, pack
        self._epoch, self._batch = 0, 0
        self._rows = self._rows_of_epoch(0)

    def steps(self, epochs: float) -> int:
        """Batches in `epochs` from the beginning; a part of an epoch counts up to the next whole batch."""
        whole = math.floor(epochs)
        steps = sum(self._batches(self._rows_of_epoch(epoch)) for epoch in range(whole))
        if epochs > whole:
            steps += math.ceil((epochs - whole) * self._batches(self._rows_of_epoch(whole)))
        return steps

    def next_batch(self) -> TokenBatch:
        """This data-parallel rank's rows of the next global batch."""
        if self._batch == self._batches(self._rows):
            self._epoch, self._batch = self._epoch + 1, 0
            self._rows = self._rows_of_epoch(self._epoch)
        first = self._batch * self._rows_per_step
        self._batch += 1
        rows = self._rows[first : first + self._rows_per_step]
        return self._pack(_own_rows(self._documents, rows, self._own), self._sequence_length)

    def save(self, directory: Path) -> None:
        """Write the position into `directory`: it is the same on every rank."""
        state = {"epoch": self._epoch, "batch": self._batch, "made_by": self._made_by()}
        write_atomically(directory / _STATE_FILE, json.dumps(state).encode())

    def load(self, directory: Path) -> None:
        """Go on where the loader stood that wrote `directory`, at any data-parallel size.

        Raises:
            ConfigError: it went through other conversations, or in another order.
        """
        state = json.loads((directory / _STATE_FILE).read_text(encoding="utf-8"))
        made_by = self._made_by()
        changed = [key for key, value in made_by.items() if state["made_by"].get(key) != value]
        if changed:
            raise ConfigError(
                [
                    f"{key}: is not what it was when {directory} was written, so its order cannot go on; set it back, "
                    "or start another run from the weights with model.init"
                    for key in changed
                ]
            )
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._rows = self._rows_of_epoch(self._epoch)

    def close(self) -> None:
        """Nothing is held open."""

    def _rows_of_epoch(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._documents))
        return _pack_in_order([len(document) for document in self._documents], order.tolist(), self._sequence_length)

    def _batches(self, rows: list[list[int]]) -> int:
        return math.ceil(len(rows) / self._rows_per_step)

    def _made_by(self) -> dict[str, int | str]:
        """What the order depends on, by the key that sets it."""
        digest = hashlib.sha256()
        for document in self._documents:
            digest.update(document.content())
        return {
            "training.seed": self._seed,
            "training.sequence_length": self._sequence_length,
            "training.global_batch_rows": self._rows_per_step,
            "data": digest.hexdigest(),
        }


def validation_batches(
    documents: Sequence[P],
    sequence_length: int,
    rows_per_step: int,
    num_batches: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    pack: Pack[P] = pack_rows,
) -> list[TokenBatch]:
    """The first documents, as many as fill `num_batches` global batches, in the file's order; this rank's rows of each.

    Raises:
        ValueError: rows that the replicas cannot share evenly.
    """
    own = _rows_of_rank(rows_per_step, data_parallel_rank, data_parallel_size)
    room = num_batches * rows_per_step * sequence_length
    lengths = np.cumsum([len(document) for document in documents])
    chosen = documents[: int(np.searchsorted(lengths, room, side="right"))]
    rows = choose_rows([len(document) for document in chosen], sequence_length)[: num_batches * rows_per_step]
    return [
        pack(_own_rows(chosen, rows[first : first + rows_per_step], own), sequence_length)
        for first in range(0, len(rows), rows_per_step)
    ]


def _pack_in_order(lengths: Sequence[int], order: Iterable[int], capacity: int) -> list[list[int]]:
    """Rows for all documents, as indices into `lengths`, roughly in `order`."""
    upcoming = iter(order)
    waiting: list[int] = []
    rows = []
    while True:
        waiting += islice(upcoming, _WAITING_DOCUMENTS - len(waiting))
        if not waiting:
            return rows
        chosen = choose_row([lengths[index] for index in waiting], capacity)
        rows.append([waiting[place] for place in chosen])
        taken = set(chosen)
        waiting = [index for place, index in enumerate(waiting) if place not in taken]


def _rows_of_rank(rows_per_step: int, rank: int, size: int) -> slice:
    if rows_per_step % size:
        raise ValueError(f"{rows_per_step} rows a step over {size} data-parallel ranks: must be a multiple of them")
    rows = rows_per_step // size
    return slice(rank * rows, (rank + 1) * rows)


def _own_rows(documents: Sequence[P], rows: list[list[int]], own: slice) -> list[list[P]]:
    """The `own` rows of a global batch, the last rows empty where there are too few."""
    chosen = rows[own] + [[]] * (own.stop - own.start - len(rows[own]))
    return [[documents[index] for index in row] for row in chosen]
