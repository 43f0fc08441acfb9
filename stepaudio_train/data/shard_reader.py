"""Samples of shards by their index in the dataset, in one read each.

In place of Energon's reader, whose layers cost more than the samples of speech corpora are worth, and which ends a run
at a damaged sample.
"""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from stepaudio_train.data.shards import index_path

_BLOCK = tarfile.BLOCKSIZE
_OPEN_SHARDS = 64


class ShardReader:
    """Random access to the samples of a dataset's shards, by Energon's index files beside them."""

    def __init__(self, shards: Sequence[tuple[Path, int]], on_damage: Callable[[str, str], None]) -> None:
        """
        Args:
            shards: path and number of samples of each, in order.
            on_damage: told the sample and the reason when one cannot be read.
        """
        self._paths = [path for path, _ in shards]
        self._ends = list(accumulate(count for _, count in shards))
        self._on_damage = on_damage
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """The members of a sample by ending, and what Energon wants to know; None if it cannot be read."""
        shard = bisect_right(self._ends, index)
        number = index - (self._ends[shard - 1] if shard else 0)
        path = self._paths[shard]
        try:
            file, offsets = self._handle(shard)
            start, end = int(offsets[number]), int(offsets[number + 1])
            content = os.pread(file, end - start, start)
            if len(content) < end - start:
                raise ValueError("the file is cut off")
            key, members = _members(content)
        except (OSError, ValueError, IndexError, tarfile.TarError) as error:
            self._on_damage(f"{path}: sample {number}", str(error))
            return None
        about = {"__key__": key, "__shard__": path.name, "__restore_key__": ("Webdataset", index), "__sources__": ()}
        return {**about, **members}

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()

    def _handle(self, shard: int) -> tuple[int, np.ndarray]:
        """An open file and the offsets of its samples, with one more for the end."""
        if shard not in self._open:
            path = self._paths[shard]
            offsets = np.fromfile(index_path(path), np.uint64)
            self._open[shard] = (os.open(path, os.O_RDONLY), offsets)
            if len(self._open) > _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1][0])
        self._open.move_to_end(shard)
        return self._open[shard]


def _members(content: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and members of a sample: plain tar entries, one behind the other."""
    key, members, position = "", {}, 0
    while position + _BLOCK <= len(content) and content[position]:
        header = content[position : position + _BLOCK]
        size = int(header[124:136].rstrip(b"\0 "), 8)
        name = header[:100].rstrip(b"\0").decode("utf-8")
        start = position + _BLOCK
        if header[156:157] not in (b"0", b"\0"):
            raise tarfile.HeaderError(f"{name}: is no plain file")
        if start + size > len(content):
            raise ValueError("a member goes beyond its sample")
        key, _, ending = name.partition(".")
        members[ending] = content[start : start + size]
        position = start + -(-size // _BLOCK) * _BLOCK
    if not members:
        raise ValueError("no member where the index says there is a sample")
    return key, members
