"""Tensors in and out of files, one at a time: safetensors, and the zip archives of torch.save.

Both are read and written at byte offsets, so that a model of any size passes through the memory of its largest tensor.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stepaudio_train.config.errors import UserError

METADATA_FILE = ".metadata"
"""Index of a checkpoint of torch.distributed.checkpoint, which is what Megatron-Core writes."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


class _Settings:
    """Stands for DeepSpeed's own objects in a checkpoint (loss scalers and the like), which hold no weights."""

    def __init__(self, *args: Any) -> None: ...


_HARMLESS_CLASSES: list[Any] = [
    (_Settings, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Settings, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Settings, "deepspeed.utils.tensor_fragment.fragment_address"),
]


class WeightError(UserError):
    """Weights that cannot be read, or are not what the model needs. The message names file and tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    path: Path
    offset: int
    """Bytes from the start of the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def row(self, index: int) -> StoredTensor:
        """The place of `tensor[index]`."""
        shape = self.shape[1:]
        size = torch.Size(shape).numel() * self.dtype.itemsize
        return StoredTensor(self.path, self.offset + index * size, shape, self.dtype)

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor

    def read_into(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor of the same dtype and number of elements."""
        view = as_bytes(tensor)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise WeightError(f"{self.path}: ends in the middle of a tensor; copy or download it again")
                done += count
            # Read once. Otherwise a large model takes all the cache, and everything else on the machine is pushed out.
            os.posix_fadvise(file.fileno(), self.offset, self.num_bytes, os.POSIX_FADV_DONTNEED)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of a safetensors file; no weight is read.

    Raises:
        WeightError: the file is no safetensors file, is cut short, or holds an unknown dtype.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise WeightError(f"{path}: is no safetensors file, or cut short; copy or download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError:
            raise WeightError(f"{path}: is no safetensors file; its header is not JSON") from None
    header.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < needed:
        raise WeightError(f"{path}: is cut short: {size:,} of {needed:,} bytes are there; copy or download it again")
    unknown = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
    if unknown:
        raise WeightError(f"{path}: holds tensors of type {', '.join(unknown)}; bf16 or fp32 are needed")
    return {
        name: StoredTensor(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES[entry["dtype"]])
        for name, entry in header.items()
    }


def start_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Write the header of a safetensors file whose tensors come later; returns each one's place, in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return read_safetensors_header(path)


def start_torch_archive(path: Path, content: Any) -> None:
    """What torch.save would write of `content`, with room for the tensors' values instead of the values.

    `torch.empty` tensors cost no memory until they are touched, and here nothing touches them.
    """
    with torch.serialization.skip_data():
        torch.save(content, path)


def map_torch_archive(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """What torch.load would give of an archive, with tensors that have no values: `stored` says where those lie.

    Args:
        offset: of the archive in its file, bytes.
        length: of the archive; None: up to the end of the file.

    Raises:
        WeightError: it cannot be read, or asks for code to be run.
    """
    try:
        with path.open("rb") as file, FakeTensorMode(), torch.serialization.safe_globals(_HARMLESS_CLASSES):
            window = _Window(file, offset, path.stat().st_size - offset if length is None else length)
            return torch.load(window, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightError(f"{path}: cannot be read, or is cut short: {first}") from error


def stored(path: Path, tensor: Tensor, archive_offset: int = 0) -> StoredTensor:
    """The place of a contiguous tensor of `map_torch_archive`."""
    if not tensor.is_contiguous():
        raise WeightError(f"{path}: holds a tensor of shape {list(tensor.shape)} that is not stored row by row")
    within = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
    return StoredTensor(path, archive_offset + within, tuple(tensor.shape), tensor.dtype)


def write_at(file: IO[bytes], offset: int, tensor: Tensor) -> None:
    """Write a contiguous tensor's memory at `offset`."""
    view, done = as_bytes(tensor), 0
    while done < len(view):
        done += os.pwrite(file.fileno(), view[done:], offset + done)


def append_torch_archive(file: IO[bytes], tensor: Tensor) -> None:
    """Append what torch.save writes of a contiguous tensor, without its checksums, which torch.load does not read."""
    head, tail = _archive_around(tuple(tensor.shape), tensor.dtype)
    file.write(head)
    file.write(as_bytes(tensor))
    file.write(tail)


@lru_cache(maxsize=64)
def _archive_around(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """The bytes of an archive before and behind the values of its one tensor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensor.pt"
        start_torch_archive(path, torch.empty(shape, dtype=dtype))
        place = stored(path, map_torch_archive(path))
        with path.open("rb") as file:
            head = file.read(place.offset)
            file.seek(place.num_bytes, os.SEEK_CUR)
            return head, file.read()


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += count
        return count
