"""Megatron-Core's distributed checkpoints (torch_dist), read and written by one process at any layout.

A checkpoint is `.metadata` (which part of which global tensor lies where), `__<rank>_<n>.distcp` (the parts, each as
torch.save writes it), `common.pt` and `metadata.json`. The layers of a model are one tensor a kind, stacked along a new
first dimension: `decoder.layers.mlp.linear_fc2.weight` is [layers, hidden, inner].
"""

from __future__ import annotations

import enum
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.tensor_files import (
    METADATA_FILE,
    StoredTensor,
    WeightError,
    append_torch_archive,
    map_torch_archive,
    stored,
)
from stepaudio_train.models.step1.weight_map import (
    Entry,
    Kind,
    entries,
    from_megatron,
    hf_shapes,
    to_megatron,
    vocab_rows,
)

_MASTER = "optimizer.state.param."
"""Prefix of the fp32 master weights that a bf16 run keeps in its optimizer."""
_WITH_EXTRA_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Layout:
    """Over which ranks a Megatron checkpoint is written. Any layout reads it."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1

    def problems(self, model: Step1Config) -> list[str]:
        """Why `model` cannot be cut like this; a line each."""
        tp, chunks = self.tensor_parallel, self.pipeline_parallel * self.virtual_pipeline
        found = [
            f"--tensor-parallel {tp}: must divide {name}={getattr(model, name)}"
            for name in ("num_attention_heads", "num_attention_groups", "intermediate_size")
            if getattr(model, name) % tp
        ]
        if model.num_hidden_layers % chunks:
            found.append(
                f"--pipeline-parallel {self.pipeline_parallel} x --virtual-pipeline {self.virtual_pipeline} = "
                f"{chunks}: must divide num_hidden_layers={model.num_hidden_layers}"
            )
        return found

    def stage(self, entry: Entry, model: Step1Config) -> int:
        """Pipeline stage that holds an entry."""
        layer = layer_of(entry)
        if layer is None:
            return 0 if entry.megatron.startswith("embedding.") else self.pipeline_parallel - 1
        per_chunk = model.num_hidden_layers // (self.pipeline_parallel * self.virtual_pipeline)
        return layer // per_chunk % self.pipeline_parallel


@dataclass(frozen=True)
class Piece:
    """A written part of a global tensor, or an object (no dtype)."""

    key: str
    file: str
    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes."""
    dtype: str | None = None
    shape: tuple[int, ...] = ()
    """Of the global tensor."""
    starts: tuple[int, ...] = ()
    """Of the part in the global tensor."""
    sizes: tuple[int, ...] = ()


def layer_of(entry: Entry) -> int | None:
    """Number of the entry's layer in the whole model; None outside the layers."""
    room, _, rest = entry.megatron.partition("decoder.layers.")
    return int(rest.partition(".")[0]) if not room and rest else None


def stacked_key(entry: Entry) -> str:
    """The entry's name in a checkpoint with stacked layers."""
    layer = layer_of(entry)
    return entry.megatron if layer is None else entry.megatron.replace(f".layers.{layer}.", ".layers.", 1)


class MegatronCheckpoint:
    """Reads the weights of a distributed checkpoint, whatever layout wrote it."""

    def __init__(self, directory: Path, model: Step1Config, prefer_masters: bool = False) -> None:
        """Args: prefer_masters: read a bf16 run's fp32 master weights instead, where there are any.

        Raises:
            WeightError: it is no such checkpoint, or lacks a weight.
        """
        self._directory, self._model = directory, model
        self._metadata = _read_metadata(directory / METADATA_FILE)
        self._parts: dict[str, list[tuple[ChunkStorageMetadata, _StorageInfo]]] = {}
        places = {(index.fqn, tuple(index.offset or ())): info for index, info in self._metadata.storage_data.items()}
        for key, kept in self._metadata.state_dict_metadata.items():
            if isinstance(kept, TensorStorageMetadata):
                self._parts[key] = [(chunk, places[key, tuple(chunk.offsets)]) for chunk in kept.chunks]
        has_masters = _MASTER + "output_layer.weight" in self._parts
        self._prefix = _MASTER if prefer_masters and has_masters else ""
        self._table = {name: entry for entry in entries(model).values() for name in entry.hf}
        self._check()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        stored = self._metadata.state_dict_metadata[self._prefix + "output_layer.weight"]
        return stored.properties.dtype  # type: ignore[union-attr]

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The Hugging Face tensors of one entry."""
        key, layer = self._key(entry)
        shape = self._shape(key)
        if layer is None:
            whole = self._assembled(key, shape, ())
        else:
            whole = self._assembled(key, shape[1:], (layer,))
        return from_megatron(entry.megatron, [whole], self._model)

    def _check(self) -> None:
        missing = [e.megatron for e in entries(self._model).values() if self._key(e)[0] not in self._parts]
        if missing:
            raise WeightError(f"{self._directory}: lacks {len(missing)} tensor(s), such as {missing[0]}")
        for entry in entries(self._model).values():
            key, layer = self._key(entry)
            shape = self._shape(key)[0 if layer is None else 1 :]
            expected = _megatron_shape(entry, self._model)
            # Other checkpoints hold the vocabulary's padding.
            fits = shape == expected or (
                entry.kind is Kind.VOCAB and shape[0] > expected[0] and shape[1:] == expected[1:]
            )
            if not fits:
                raise WeightError(f"{self._directory}: {key} has shape {list(shape)}, the model needs {list(expected)}")

    def _key(self, entry: Entry) -> tuple[str, int | None]:
        """Name in this checkpoint, and the layer to take out of it if layers are stacked."""
        whole = self._prefix + entry.megatron
        return (whole, None) if whole in self._parts else (self._prefix + stacked_key(entry), layer_of(entry))

    def _shape(self, key: str) -> tuple[int, ...]:
        stored = self._metadata.state_dict_metadata[key]
        return tuple(stored.size)  # type: ignore[union-attr]

    def _assembled(self, key: str, shape: tuple[int, ...], first: tuple[int, ...]) -> Tensor:
        """A global tensor, or its slice at index `first` of the stacked dimension."""
        found: list[tuple[tuple[slice, ...], StoredTensor]] = []
        for chunk, info in self._parts[key]:
            start, size = chunk.offsets[0], chunk.sizes[0]
            if first and not start <= first[0] < start + size:
                continue
            part, skip = self._place(info), len(first)
            where = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[skip:], chunk.sizes[skip:], strict=True))
            if first:
                part = part.row(first[0] - start)
            found.append((where, part))
        if sum(math.prod(part.shape) for _, part in found) != math.prod(shape):
            raise WeightError(f"{self._directory}: the parts of {key} do not make up {list(shape)}")
        whole = torch.empty(shape, dtype=found[0][1].dtype)
        for where, part in found:
            room = whole[where]
            if room.is_contiguous():
                part.read_into(room)
            else:
                room.copy_(part.read())
        return whole

    def _place(self, info: _StorageInfo) -> StoredTensor:
        path = self._directory / info.relative_path
        return stored(path, map_torch_archive(path, info.offset, info.length), info.offset)


class MegatronWriter:
    """Writes a distributed checkpoint entry by entry, into the files that the ranks of `layout` would write."""

    def __init__(self, directory: Path, model: Step1Config, layout: Layout) -> None:
        self._directory, self._model, self._layout = directory, model, layout
        self._pieces: list[Piece] = []
        directory.mkdir(parents=True, exist_ok=True)

    def resume(self, pieces: list[Piece]) -> None:
        """Go on behind `pieces`, which an earlier writer wrote; what it wrote after them is cut off."""
        self._pieces = list(pieces)
        ends = {piece.file: 0 for piece in pieces}
        for piece in pieces:
            ends[piece.file] = max(ends[piece.file], piece.offset + piece.length)
        for path in self._directory.glob("*.distcp"):
            with path.open("r+b") as file:
                file.truncate(ends.get(path.name, 0))

    def write(self, entry: Entry, hf_tensors: dict[str, Tensor]) -> list[Piece]:
        """Append one entry; returns what `resume` needs to know of it."""
        tp, model = self._layout.tensor_parallel, self._model
        stage, layer, key = self._layout.stage(entry, model), layer_of(entry), stacked_key(entry)
        shape = _megatron_shape(entry, model)
        padded = -(-model.vocab_size // tp) * tp
        written: list[Piece] = []
        for rank in range(1 if entry.kind is Kind.REPLICATED else tp):
            part = to_megatron(entry.megatron, hf_tensors, model, rank, tp, padded)
            if entry.kind is Kind.VOCAB:
                rows = vocab_rows(model, rank, tp, padded)
                part = part[: max(0, min(rows.stop, model.vocab_size) - rows.start)]
            file = f"__{stage * tp + rank}_0.distcp"
            for starts, piece in _chunks(entry, part, rank, tp, shape):
                if layer is not None:
                    starts, piece = (layer, *starts), piece[None]
                whole = shape if layer is None else (model.num_hidden_layers, *shape)
                written.append(self._append_tensor(file, key, piece, starts, whole))
        if layer is not None and any(f".{name}." in entry.megatron for name in _WITH_EXTRA_STATE):
            extra = key.replace(".weight", f"._extra_state/shard_{layer}_{model.num_hidden_layers}")
            written.append(self._append_object(f"__{stage * tp}_0.distcp", extra))
        elif key == "output_layer.weight":
            written.append(self._append_object(f"__{stage * tp}_0.distcp", "output_layer._extra_state/shard_0_1"))
        self._pieces += written
        return written

    def finish(self) -> None:
        """Write the index of what was written."""
        metadata = Metadata({}, storage_data={})
        for piece in self._pieces:
            info = _StorageInfo(piece.file, piece.offset, piece.length)
            if piece.dtype is None:
                metadata.state_dict_metadata[piece.key] = BytesStorageMetadata()
                metadata.storage_data[MetadataIndex(piece.key)] = info
                continue
            chunk = ChunkStorageMetadata(torch.Size(piece.starts), torch.Size(piece.sizes))
            if piece.key not in metadata.state_dict_metadata:
                properties = TensorProperties(dtype=_dtype_of(piece.dtype))
                metadata.state_dict_metadata[piece.key] = TensorStorageMetadata(properties, torch.Size(piece.shape), [])
            metadata.state_dict_metadata[piece.key].chunks.append(chunk)
            metadata.storage_data[MetadataIndex(piece.key, chunk.offsets)] = info
        torch.save({}, self._directory / "common.pt")
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        (self._directory / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")
        with (self._directory / METADATA_FILE).open("wb") as file:
            pickle.dump(metadata, file)

    def _append_tensor(
        self, name: str, key: str, tensor: Tensor, starts: tuple[int, ...], shape: tuple[int, ...]
    ) -> Piece:
        with (self._directory / name).open("ab") as file:
            offset = file.tell()
            append_torch_archive(file, tensor.contiguous())
            length = file.tell() - offset
        return Piece(key, name, offset, length, str(tensor.dtype), shape, starts, tuple(tensor.shape))

    def _append_object(self, name: str, key: str) -> Piece:
        with (self._directory / name).open("ab") as file:
            offset = file.tell()
            # Layers without scaling factors have none for an extra state.
            torch.save([None], file)
            return Piece(key, name, offset, file.tell() - offset)


def _chunks(
    entry: Entry, part: Tensor, rank: int, tp: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A rank's part in the pieces of the global tensor that it is made of: (start of the piece, piece)."""
    if entry.kind is Kind.GATE_UP:
        # In the global tensor all of the gate comes first.
        half = shape[0] // 2
        for index, piece in enumerate(part.chunk(2)):
            yield (index * half + rank * (half // tp), 0), piece
    elif entry.kind is Kind.ROW:
        yield (0, rank * part.shape[1]), part
    elif entry.kind is Kind.VOCAB:
        # All ranks but the last real one hold equally many rows.
        yield (rank * -(-shape[0] // tp), 0), part
    else:
        yield (rank * part.shape[0], *[0] * (part.ndim - 1)), part


def _megatron_shape(entry: Entry, model: Step1Config) -> tuple[int, ...]:
    """Shape of the whole Megatron tensor, without padding and without the stacked dimension."""
    shapes = [hf_shapes(model)[name] for name in entry.hf]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _read_metadata(path: Path) -> Metadata:
    if not path.is_file():
        raise WeightError(f"{path}: no such file; this is no complete Megatron-Core checkpoint")
    with path.open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise WeightError(f"{path}: cannot be read: {error}") from None
    if not isinstance(metadata, Metadata):
        raise WeightError(f"{path}: holds a {type(metadata).__name__}, not the index of a checkpoint")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the plain data classes that an index is made of, and nothing else: a pickle may ask for anything."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.serialization") and name in ("Size", "_get_layout"):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return super().find_class(module, name)
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "set"), ("pathlib", "PosixPath")):
            return super().find_class(module, name)
        if module.startswith("torch.distributed.checkpoint."):
            found = super().find_class(module, name)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index of a checkpoint needs")
