"""What an engine says of every token of many preference pairs: references for DPO, scores of held-out pairs.

Replicas tell each other through files, which are kept on the way: what was computed before a kill is not computed
again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.config.schema import TrainingConfig
from stepaudio_train.data.files import replacing
from stepaudio_train.data.packing import choose_rows
from stepaudio_train.data.preferences import DocumentPair, pack_pairs
from stepaudio_train.engines.base import Engine
from stepaudio_train.objectives.base import TokenOutputs

_WHOLE_FILE, _PARTS = "pairs.safetensors", "parts"
_PACKED_AT_A_TIME = 512


def pair_outputs(
    engine: Engine,
    pairs: Sequence[DocumentPair],
    training: TrainingConfig,
    read: Callable[[TokenOutputs], Tensor],
    folder: Path,
    progress: str = "",
) -> list[NDArray[np.float32]]:
    """One number a token of every pair: of the chosen document's tokens, then of the rejected one's, [len(pair)] each.

    Every rank calls it, and gets all of them. They are computed a global batch at a time, and what `folder` holds is
    taken from there: it must be of the same pairs and weights.

    Args:
        read: picks the numbers, [R, T], of a micro-batch.
        folder: seen by all processes.
        progress: what the progress bar says; '' for none.
    """
    if not is_complete(folder):
        lengths = [len(pair) for pair in pairs]
        rows = _rows(lengths, training.sequence_length)
        _compute(engine, pairs, rows, training, read, folder / _PARTS, progress)
        if engine.is_main:
            _join(lengths, rows, training.global_batch_rows, folder, engine.data_parallel_size)
        engine.barrier()
    values = load_file(folder / _WHOLE_FILE)["values"].numpy()
    return np.split(values, np.cumsum([len(pair) for pair in pairs])[:-1])


def is_complete(folder: Path) -> bool:
    """Whether `pair_outputs` has nothing left to compute there."""
    return (folder / _WHOLE_FILE).is_file()


def _rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Well filled rows of neighbouring pairs, as indices."""
    starts = range(0, len(lengths), _PACKED_AT_A_TIME)
    blocks = ((start, lengths[start : start + _PACKED_AT_A_TIME]) for start in starts)
    return [[start + index for index in row] for start, block in blocks for row in choose_rows(block, capacity)]


def _compute(
    engine: Engine,
    pairs: Sequence[DocumentPair],
    rows: list[list[int]],
    training: TrainingConfig,
    read: Callable[[TokenOutputs], Tensor],
    parts: Path,
    progress: str,
) -> None:
    """Write every replica's numbers of every global batch that is not there yet."""
    replica, replicas = engine.data_parallel_rank, engine.data_parallel_size
    firsts = range(0, len(rows), training.global_batch_rows)
    missing = [f for f in firsts if not all(_part(parts, f, r, replicas).is_file() for r in range(replicas))]
    # Nobody writes before everybody has looked: all go through the same batches.
    engine.barrier()
    for first in tqdm(missing, progress, disable=not (progress and engine.is_main), dynamic_ncols=True):
        own = _own_rows(rows, first, training.global_batch_rows, replica, replicas)
        empty: list[list[int]] = [[]] * (training.global_batch_rows // replicas - len(own))
        batch = pack_pairs([[pairs[i] for i in row] for row in own + empty], training.sequence_length)
        outputs = engine.outputs(batch.split(training.micro_batch_rows))
        if engine.is_replica_main:
            values = torch.cat([read(output).float().cpu() for output in outputs])
            filled = [values[number, : sum(len(pairs[i]) for i in row)] for number, row in enumerate(own)]
            with replacing(_part(parts, first, replica, replicas)) as temporary:
                save_file({"values": torch.cat([values.new_empty(0), *filled])}, temporary)
    engine.barrier()


def _join(lengths: Sequence[int], rows: list[list[int]], rows_per_batch: int, folder: Path, replicas: int) -> None:
    """All parts as one file, in the pairs' order."""
    starts = np.cumsum([0, *lengths])
    values = torch.empty(int(starts[-1]))
    for first in range(0, len(rows), rows_per_batch):
        for replica in range(replicas):
            part = load_file(_part(folder / _PARTS, first, replica, replicas))["values"]
            places = [i for row in _own_rows(rows, first, rows_per_batch, replica, replicas) for i in row]
            for place, piece in zip(places, part.split([lengths[i] for i in places]), strict=True):
                values[starts[place] : starts[place + 1]] = piece
    with replacing(folder / _WHOLE_FILE) as temporary:
        save_file({"values": values}, temporary)
    shutil.rmtree(folder / _PARTS)


def _own_rows(rows: list[list[int]], first: int, rows_per_batch: int, replica: int, replicas: int) -> list[list[int]]:
    """A replica's rows of the global batch that begins with row `first`."""
    share = rows_per_batch // replicas
    return rows[first : first + rows_per_batch][replica * share : (replica + 1) * share]


def _part(parts: Path, first: int, replica: int, replicas: int) -> Path:
    return parts / f"{first:08d}.{replica}-of-{replicas}.safetensors"
