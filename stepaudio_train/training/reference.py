"""DPO's reference: what the first weights say of every answer, computed once, so that memory holds one model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.paths import latest_checkpoint
from stepaudio_train.config.preference_runs import DpoRunConfig
from stepaudio_train.convert.sources import open_source
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import REFERENCE_LOG_PROBS
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.preferences import DocumentPair, pack_pairs
from stepaudio_train.engines.base import Engine
from stepaudio_train.training.pair_outputs import is_complete, pair_outputs
from stepaudio_train.training.run_directory import RunDirectory
from stepaudio_train.training.weights import initialise

_MADE_BY_FILE = "made_by.json"
_SAMPLE_BYTES = 2**20


@dataclass(frozen=True)
class ReferencedPair(DocumentPair):
    """A pair, and what the first weights say of it."""

    reference: NDArray[np.float32]
    """[len(pair)]: log-probabilities of the targets of the chosen document's tokens, then of the rejected one's."""


def pack_referenced(rows: Sequence[Sequence[ReferencedPair]], sequence_length: int) -> TokenBatch:
    """As `data.preferences.pack_pairs`, with the reference in the extras."""
    batch = pack_pairs(rows, sequence_length)
    reference = torch.zeros(batch.loss_weights.shape)
    for number, row in enumerate(rows):
        for start, pair in zip(np.cumsum([0, *map(len, row)]), row, strict=False):
            reference[number, start : start + len(pair)] = torch.from_numpy(pair.reference)
    return replace(batch, extras=batch.extras | {REFERENCE_LOG_PROBS: reference})


def with_reference(
    engine: Engine, config: DpoRunConfig, run: RunDirectory, sets: Mapping[str, Sequence[DocumentPair]]
) -> dict[str, list[ReferencedPair]]:
    """Every set of pairs, "data" and perhaps "held_out", with the log-probabilities under the weights of `model.init`.

    Every rank calls it, before the training. They are kept in `RUN_DIR/reference/<set>/`, with what they were made of:
    other pairs or other first weights are computed anew. A run that goes on keeps those that it began with.

    Raises:
        ConfigError: a run that goes on has other pairs now, or lacks a reference and has another `model.init`.
    """
    weights, begun = fingerprint(config.model.init), latest_checkpoint(run.checkpoints) is not None
    folders = {name: run.path / "reference" / name for name in sets}
    made_by = {name: {"weights": weights, "pairs": _digest(pairs)} for name, pairs in sets.items()}
    before = {name: _read_made_by(folder) for name, folder in folders.items()}
    stale = [name for name in sets if before[name] != made_by[name]]
    if begun:
        stale = [name for name in stale if before[name].get("pairs") != made_by[name]["pairs"]]
        _require_the_first(config, run, stale, before["data"], made_by["data"])
    # All have looked before the main rank changes anything.
    engine.barrier()
    if engine.is_main:
        for name in stale:
            shutil.rmtree(folders[name], ignore_errors=True)
            write_atomically(folders[name] / _MADE_BY_FILE, json.dumps(made_by[name]).encode())
    engine.barrier()
    if not all(map(is_complete, folders.values())):
        initialise(engine, config)
    found = {}
    for name, pairs in sets.items():
        progress = f"reference of {name}" if config.logging.progress_bar else ""
        values = pair_outputs(engine, pairs, config.training, lambda o: o.log_probs, folders[name], progress)
        fields = ((pair.chosen, pair.rejected, pair.category, pair.margin) for pair in pairs)
        found[name] = [ReferencedPair(*one, value) for one, value in zip(fields, values, strict=True)]
    return found


def _require_the_first(
    config: DpoRunConfig, run: RunDirectory, stale: Sequence[str], before: Mapping[str, str], now: Mapping[str, str]
) -> None:
    """See that what a run that goes on still has to compute can be computed as at its beginning."""
    mend = "put it back, or type run_dir=ANOTHER_FOLDER"
    if before and "data" in stale:
        raise ConfigError([f"data={config.data.path}: its pairs are not those that {run.path} began with; {mend}"])
    if stale and before.get("weights", now["weights"]) != now["weights"]:
        raise ConfigError(
            [
                f"model.init={config.model.init}: is not what {run.path} began with, and the reference of "
                f"{', '.join(stale)} has to be computed with that; {mend}"
            ]
        )


def _read_made_by(folder: Path) -> dict[str, str]:
    file = folder / _MADE_BY_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _digest(pairs: Sequence[DocumentPair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(pair.content())
    return digest.hexdigest()


def fingerprint(init: str | Path | None) -> str:
    """Tells weights by the names, sizes, beginnings, middles and ends of their files."""
    assert init is not None, "checked before"
    folder, digest = open_source(Path(init), prefer_masters=True).path, hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            for place in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
