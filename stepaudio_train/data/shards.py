"""WebDataset tars: written whole, indexed for Megatron-Energon, read in order.

A sample is a run of members that share a key: `<key>.json` holds its record, `<key>.<ending>` what the record's audio
parts name by their ending (`flac`, or `0.flac`, `1.flac`, ... where there are several).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import replacing, write_atomically

SHARD_PATTERN = "shard-*.tar"
META_FOLDER = ".nv-meta"
"""Where Megatron-Energon keeps what it knows of a dataset."""
_INFO_FILE = ".info.json"


class ShardError(UserError):
    """A shard cannot be read. The message names it."""


@dataclass(frozen=True)
class ShardSample:
    """One sample of a tar."""

    key: str
    members: Mapping[str, bytes]
    """Ending -> content."""


def shard_name(index: int) -> str:
    """File name of a dataset's `index`-th shard."""
    return f"shard-{index:06d}.tar"


def sample_key(record_id: str) -> str:
    """A tar key that still shows the record's id, and is unique where ids are."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", record_id)[:60]
    return f"{readable}-{hashlib.sha256(record_id.encode()).hexdigest()[:10]}"


def write_shard(path: Path, samples: Iterable[ShardSample]) -> int:
    """Write a tar and its index, whole or not at all; returns the number of samples. None of them, no tar."""
    offsets: list[int] = []
    with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for sample in samples:
            offsets.append(tar.offset)
            for ending, content in sample.members.items():
                member = tarfile.TarInfo(f"{sample.key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        end = tar.offset
    if not offsets:
        path.unlink()
        return 0
    write_atomically(index_path(path), np.asarray([*offsets, end], np.uint64).tobytes())
    return len(offsets)


def index_path(shard: Path) -> Path:
    """Beside a shard: where each sample begins, and where the last one ends, as Megatron-Energon has it."""
    return shard.with_suffix(".tar.idx")


def read_shard(path: Path) -> Iterator[ShardSample]:
    """Samples of a tar, in order.

    Raises:
        ShardError: the tar is missing, no tar, or cut off; the samples before the cut have been yielded.
    """
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                file = tar.extractfile(member)
                content = file.read() if file is not None else b""
                if len(content) < member.size:
                    raise tarfile.ReadError("unexpected end of data")
                if folder + slash + stem != key and members:
                    yield ShardSample(key, members)
                    members = {}
                key = folder + slash + stem
                members[ending] = content
        _require_end(path)
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path}: cannot be read to its end: {error}") from error
    if members:
        yield ShardSample(key, members)


def _require_end(path: Path) -> None:
    """A tar ends with two blocks of zeros; `tarfile` takes one that is cut off at a header for whole.

    Raises:
        ReadError: the end is missing.
    """
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 2 * tarfile.BLOCKSIZE))
        if any(file.read()):
            raise tarfile.ReadError("its end is missing")


def list_shards(folder: Path) -> list[Path]:
    """The tars of a dataset folder, in order.

    Raises:
        ShardError: there is none.
    """
    shards = sorted(folder.glob(SHARD_PATTERN))
    if not shards:
        raise ShardError(f"{folder}: no {SHARD_PATTERN} in it; `stepaudio prepare` and `stepaudio tokenize` write them")
    return shards


def shard_counts(folder: Path) -> dict[str, int]:
    """Shard name -> number of samples, as indexed.

    Raises:
        ShardError: the folder is no finished dataset, or a shard of it is gone.
    """
    info = folder / META_FOLDER / _INFO_FILE
    try:
        counts: dict[str, int] = json.loads(info.read_text(encoding="utf-8"))["shard_counts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{folder}: is no finished dataset ({info} cannot be read: {error})") from error
    missing = [name for name in counts if not (folder / name).is_file()]
    if missing:
        raise ShardError(f"{folder}: {', '.join(missing)} missing; copy the folder again, or write it again")
    return counts


def finish_dataset(folder: Path, counts: Mapping[str, int]) -> None:
    """Make a folder of shards (name -> samples) a Megatron-Energon dataset. Without this it is unfinished."""
    meta = folder / META_FOLDER
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_atomically(meta / "dataset.yaml", yaml.safe_dump(dataset).encode())
    split = {"split_parts": {"train": list(counts)}, "exclude": []}
    write_atomically(meta / "split.yaml", yaml.safe_dump(split).encode())
    info = {"energon_version": version("megatron-energon"), "shard_counts": dict(counts)}
    write_atomically(meta / _INFO_FILE, json.dumps(info, indent=1).encode())
