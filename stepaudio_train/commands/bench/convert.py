"""`stepaudio bench convert`: each format's rate, beside what the disk itself does with the same bytes; peak memory.

Random weights go from Hugging Face layout to Megatron (TP=4 where the key heads allow it, PP=2), back, to DeepSpeed
ZeRO-3 (8 ranks), and back. After every leg back the weights are compared with the first ones, byte for byte. The disk's
own time is that of reading the source's bytes, not cached, and then writing the destination's until the disk has them,
in blocks of 16 MiB, flushed and dropped from the cache every 256 MiB as the conversion does. The start of Python is not
counted. Needs disk space for six times the weights: ZeRO-3 keeps them in fp32, and the disk's own time takes a copy.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepaudio_train.commands.bench.reporting import report
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import PretrainConfig, Step1Config
from stepaudio_train.convert.companions import write_companions
from stepaudio_train.convert.huggingface_files import SafetensorsWriter
from stepaudio_train.models.step1.weight_map import entries, hf_shapes

_BLOCK_BYTES, _FLUSH_BYTES = 16 * 2**20, 256 * 2**20
_LEGS = (
    ("hf", "megatron", "--to megatron --tensor-parallel {tp} --pipeline-parallel 2"),
    ("megatron", "hf_of_megatron", "--to hf"),
    ("hf_of_megatron", "zero3", "--to deepspeed --zero-ranks 8"),
    ("zero3", "hf_of_zero3", "--to hf"),
)


@dataclass(frozen=True)
class ConvertBenchOptions:
    """What `stepaudio bench convert` takes."""

    overrides: tuple[str, ...] = ()
    """Such as model=step1_3b; without any, the model of 60 million parameters."""
    folder: Path | None = None
    """Where to write; None: the folder of temporary files."""
    json: Path | None = None


def bench_convert(options: ConvertBenchOptions) -> int:
    """Print and write the table; the exit status.

    Raises:
        UserError: a way there and back changed the weights.
    """
    model = load_config("pretrain", PretrainConfig, options.overrides or ["model=step1_60m"]).model
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        _make(folder / "hf", model)
        first = _digests(folder / "hf")
        rows = []
        for source, destination, arguments in _LEGS:
            tp = math.gcd(4, model.num_attention_groups)
            rows.append(_leg(folder / source, folder / destination, arguments.format(tp=tp).split()))
            if destination.startswith("hf") and _digests(folder / destination) != first:
                raise UserError(f"{destination} holds other bytes than hf: a conversion changes weights")
            if source != "hf":
                shutil.rmtree(folder / source)
    report("Conversion", rows, options.json)
    return 0


def _make(folder: Path, model: Step1Config) -> None:
    """A directory of random bf16 weights."""
    writer = SafetensorsWriter(folder, model, torch.bfloat16)
    shapes = hf_shapes(model)
    for entry in entries(model).values():
        writer.write(entry, {n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(std=0.02) for n in entry.hf})
    writer.finish()
    write_companions(folder, model, "bfloat16", None, add_bos=True, card=None)


def _leg(source: Path, destination: Path, arguments: list[str]) -> dict[str, Any]:
    sizes = _forget(source)
    command = [sys.executable, "-m", "stepaudio_train.cli", "convert", str(source), str(destination), *arguments]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.search(r"in ([\d.]+) s", output)
    assert found is not None, output
    seconds = float(found.group(1))
    # Of all children so far: the largest is what counts.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    read_s, write_s = _disk_seconds(source, destination)
    written = _forget(destination)
    return {
        "leg": f"{source.name} to {destination.name}",
        "read GB": sizes / 1e9,
        "written GB": written / 1e9,
        "seconds": seconds,
        "disk alone, s": read_s + write_s,
        "of the disk's rate": (read_s + write_s) / seconds,
        "peak memory GB": peak / 1e9,
    }


def _disk_seconds(source: Path, destination: Path) -> tuple[float, float]:
    """How long it takes to read the bytes of one, and to write those of the other."""
    _forget(source)
    started = time.perf_counter()
    for path in _files(source):
        for _ in _blocks(path):
            continue
    read_s = time.perf_counter() - started
    block = os.urandom(_BLOCK_BYTES)
    copy = destination.with_name("disk")
    started = time.perf_counter()
    with copy.open("wb", buffering=0) as file:
        left = sum(path.stat().st_size for path in _files(destination))
        while left:
            left -= file.write(block[: min(left, _BLOCK_BYTES)])
            if left // _FLUSH_BYTES != (left + _BLOCK_BYTES) // _FLUSH_BYTES:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.fsync(file.fileno())
    write_s = time.perf_counter() - started
    copy.unlink()
    return read_s, write_s


def _forget(folder: Path) -> int:
    """Take a folder's files out of the cache; their bytes."""
    total = 0
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        total += path.stat().st_size
    return total


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in _files(folder):
        if path.suffix == ".safetensors":
            digest = hashlib.sha256()
            for block in _blocks(path):
                digest.update(block)
            found[path.name] = digest.hexdigest()
    return found


def _blocks(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
