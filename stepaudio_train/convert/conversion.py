"""From one format to another, entry by entry: bounded memory, stopped and taken up again, whole or absent."""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.deepspeed_files import UniversalWriter, ZeroThreeWriter
from stepaudio_train.convert.huggingface_files import SafetensorsWriter
from stepaudio_train.convert.megatron_files import Layout, MegatronWriter, Piece
from stepaudio_train.convert.sources import COMPANIONS, Format, WeightReader
from stepaudio_train.models.step1.weight_map import Entry, entries, hf_shapes

_JOURNAL = "conversion.jsonl"
_FLUSH_BYTES = 256 * 2**20
_READ_AHEAD = 2
"""Entries in memory besides the one that is being written."""


class WeightWriter(Protocol):
    """Writes the weights of one model, entry by entry."""

    def write(self, entry: Entry, hf_tensors: dict[str, Tensor]) -> list[Any]:
        """Write one entry; returns what `resume` needs to know of it, as dataclasses."""

    def resume(self, pieces: list[Any]) -> None:
        """Go on behind what was written before."""

    def finish(self) -> None:
        """Write what is known only at the end."""


@dataclass(frozen=True)
class Destination:
    """Where weights go, and in what form."""

    path: Path
    format: Format
    layout: Layout = field(default_factory=Layout)
    """`megatron`."""
    zero_ranks: int | None = 1
    """`deepspeed`: ranks of a ZeRO-3 checkpoint; None: a universal one."""

    def writer(self, folder: Path, model: Step1Config, dtype: torch.dtype) -> WeightWriter:
        """Writes into `folder`."""
        if self.format == "megatron":
            return MegatronWriter(folder, model, self.layout)
        if self.format == "deepspeed":
            ranks = self.zero_ranks
            return UniversalWriter(folder, model) if ranks is None else ZeroThreeWriter(folder, model, ranks)
        if self.format == "plain":
            return SafetensorsWriter(folder, model, dtype, shard_bytes=None)
        return SafetensorsWriter(folder, model, dtype)


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    num_tensors: int
    num_bytes: int
    """Of the weights as they were read."""
    seconds: float


def convert(
    reader: WeightReader,
    model: Step1Config,
    destination: Destination,
    write_companions: Callable[[Path], None],
    origin: str,
    progress: bool = True,
) -> Converted:
    """Write all weights of `reader` and the files beside them. `destination.path` appears when all is there.

    Stopped half-way, the same call goes on with the first entry that is missing.

    Args:
        write_companions: writes everything but the weights into a folder that exists.
        origin: says what is read; what was begun from another origin is begun anew.

    Raises:
        UserError: the destination is there already.
    """
    if destination.path.exists():
        raise UserError(f"{destination.path}: is there already; type another folder, or delete it")
    partial = destination.path.with_name(destination.path.name + ".partial")
    settings = {"origin": origin, "destination": repr(destination), "model": asdict(model), "dtype": str(reader.dtype)}
    journal = _Journal(partial, settings)
    writer = destination.writer(partial, model, reader.dtype)
    if journal.done:
        writer.resume(journal.pieces)
    waiting = [entry for entry in entries(model).values() if entry.megatron not in journal.done]
    sizes = {name: torch.Size(shape).numel() for name, shape in hf_shapes(model).items()}
    numel, left = sum(sizes.values()), sum(sizes[name] for entry in waiting for name in entry.hf)
    _require_space(partial, left * (4 if destination.format == "deepspeed" else reader.dtype.itemsize))
    started_s, num_bytes = time.monotonic(), 0
    bar = tqdm(
        total=numel * reader.dtype.itemsize,
        initial=(numel - left) * reader.dtype.itemsize,
        unit="B",
        unit_scale=True,
        desc=destination.path.name,
        disable=not progress,
        dynamic_ncols=True,
    )
    flusher = _Flusher(partial)
    try:
        with journal, bar:
            for entry, tensors in _read_ahead(reader, waiting):
                journal.add(entry, writer.write(entry, tensors))
                size = sum(tensor.nbytes for tensor in tensors.values())
                num_bytes += size
                flusher.add(size)
                bar.update(size)
    finally:
        flusher.stop()
    writer.finish()
    beside = partial if destination.format == "hf" else partial / COMPANIONS
    beside.mkdir(exist_ok=True)
    write_companions(beside)
    journal.path.unlink()
    _flush(partial)
    partial.rename(destination.path)
    return Converted(sum(len(entry.hf) for entry in waiting), num_bytes, time.monotonic() - started_s)


def _read_ahead(reader: WeightReader, waiting: list[Entry]) -> Iterator[tuple[Entry, dict[str, Tensor]]]:
    """Read in a thread of its own, so that one disk reads while another, or the same one's cache, writes."""
    ready: queue.Queue[tuple[Entry, dict[str, Tensor]] | BaseException | None] = queue.Queue(_READ_AHEAD)
    stop = threading.Event()

    def read() -> None:
        try:
            for entry in waiting:
                item = (entry, reader.read(entry))
                while not stop.is_set():
                    try:
                        ready.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


class _Flusher:
    """Makes the disk write behind the conversion, in a thread of its own, and takes what it has out of the cache."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._unwritten_bytes, self._stopped = folder, 0, False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, num_bytes: int) -> None:
        """That much more has been written to files."""
        self._unwritten_bytes += num_bytes
        if self._unwritten_bytes >= _FLUSH_BYTES:
            self._unwritten_bytes = 0
            self._wake.set()

    def stop(self) -> None:
        """Returns when the thread has ended; what was written last may not be on the disk."""
        self._stopped = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while self._wake.wait() and not self._stopped:
            self._wake.clear()
            _flush(self._folder)


def _flush(folder: Path) -> None:
    """Wait until the disk has all of a folder: what is renamed next must not be empty after a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _require_space(folder: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise UserError(
            f"{folder}: disk full: {num_bytes / 2**30:.2f} GiB needed, {free_bytes / 2**30:.2f} GiB free; make room, "
            "then the same command goes on"
        )


class _Journal:
    """Which entries are written: a line each, in the unfinished folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / _JOURNAL
        self.done: set[str] = set()
        self.pieces: list[Piece] = []
        lines = self._lines()
        if lines and lines[0] == settings:
            for line in lines[1:]:
                self.done.add(line["entry"])
                self.pieces += [_piece(fields) for fields in line["pieces"]]
            self._start = lines
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._start = [settings]

    def __enter__(self) -> _Journal:
        self._file = self.path.open("w", encoding="utf-8", buffering=1)
        for line in self._start:
            self._file.write(json.dumps(line) + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, entry: Entry, pieces: list[Any]) -> None:
        """An entry is written."""
        self._file.write(json.dumps({"entry": entry.megatron, "pieces": [asdict(piece) for piece in pieces]}) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the line a kill cut in half
        return lines


def _piece(fields: dict[str, Any]) -> Piece:
    return Piece(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
