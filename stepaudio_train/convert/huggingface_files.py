"""Weights in Hugging Face layout: safetensors files of bounded size with an index, in the released naming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.tensor_files import (
    StoredTensor,
    WeightError,
    read_safetensors_header,
    start_safetensors,
    write_at,
)
from stepaudio_train.models.step1.weight_map import Entry, hf_shapes

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class SafetensorsWeights:
    """The weights in a folder's safetensors files, whatever they are called."""

    def __init__(self, directory: Path, model: Step1Config) -> None:
        """
        Raises:
            WeightError: naming the file that is cut short or a pickle, and all tensors that are missing or do not fit.
        """
        self._directory, self._model = directory, model
        self._tensors: dict[str, StoredTensor] = {}
        for path in self._files():
            self._tensors |= read_safetensors_header(path)
        self._check_tensors()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._tensors[_EMBEDDING].dtype

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of one entry."""
        return {name: self._tensors[name].read() for name in entry.hf}

    def _files(self) -> list[Path]:
        """Those that the index names; without one, those that are named like weights, or else all."""
        index = self._directory / INDEX_FILE
        if not index.is_file():
            found = sorted(self._directory.glob("model*.safetensors")) or sorted(self._directory.glob("*.safetensors"))
            if not found:
                raise WeightError(_no_safetensors(self._directory))
            return found
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        absent = [name for name in names if not (self._directory / name).is_file()]
        if absent:
            raise WeightError(f"{self._directory}: lacks {', '.join(absent)}, which {INDEX_FILE} names; download it")
        return [self._directory / name for name in names]

    def _check_tensors(self) -> None:
        shapes = hf_shapes(self._model)
        missing = [name for name in shapes if name not in self._tensors]
        if missing == [_HEAD]:
            raise WeightError(
                f"{self._directory}: has no {_HEAD}: its head is tied to the embedding, and Step-1's is a matrix of "
                "its own; save the model with tie_word_embeddings=false"
            )
        problems = []
        if missing:
            problems.append(f"lacks {len(missing)} tensor(s), such as {missing[0]}")
        unknown = [name for name in self._tensors if name not in shapes]
        if unknown:
            problems.append(f"holds {len(unknown)} tensor(s) that Step-1 has not, such as {unknown[0]}")
        problems += [
            f"{name} has shape {list(self._tensors[name].shape)}, config.json says {list(shape)}"
            for name, shape in shapes.items()
            if name in self._tensors and self._tensors[name].shape != shape
        ][:4]
        kinds = {self._tensors[name].dtype for name in shapes if name in self._tensors}
        if len(kinds) > 1:
            problems.append(f"mixes {', '.join(sorted(map(str, kinds)))}; one dtype is needed")
        if problems:
            raise WeightError(f"{self._directory}: {'; '.join(problems)}")


class SafetensorsWriter:
    """Writes a folder's safetensors files entry by entry; every tensor has its place from the beginning."""

    def __init__(
        self, directory: Path, model: Step1Config, dtype: torch.dtype, shard_bytes: int | None = SHARD_BYTES
    ) -> None:
        """Args: shard_bytes: of a file at most; None: one file, model.safetensors, without an index."""
        self._directory, self._dtype = directory, dtype
        directory.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, StoredTensor] = {}
        self._shards = (
            {"model.safetensors": hf_shapes(model)}
            if shard_bytes is None
            else plan_shards(hf_shapes(model), dtype, shard_bytes)
        )
        self._has_index = shard_bytes is not None

    def resume(self, pieces: list[object]) -> None:
        """Every tensor has its place, so there is nothing to remember."""
        for file, shapes in self._shards.items():
            self._places |= read_safetensors_header(self._directory / file)
            assert shapes.keys() <= self._places.keys()

    def write(self, entry: Entry, hf_tensors: Mapping[str, Tensor]) -> list[object]:
        """Write the tensors of one entry."""
        for name in entry.hf:
            self.write_tensor(name, hf_tensors[name])
        return []

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        if not self._places:
            for file, shapes in self._shards.items():
                self._places |= start_safetensors(self._directory / file, shapes, self._dtype)
        place = self._places[name]
        assert (tuple(tensor.shape), tensor.dtype) == (place.shape, place.dtype), name
        with place.path.open("r+b") as file:
            write_at(file, place.offset, tensor.contiguous())

    def finish(self) -> None:
        """Write the index."""
        if not self._has_index:
            return
        text = json.dumps(make_index(self._shards, self._dtype), indent=2) + "\n"
        (self._directory / INDEX_FILE).write_text(text, encoding="utf-8")


Shards = Mapping[str, Mapping[str, tuple[int, ...]]]
"""File -> name of a tensor -> its shape, in the order in which they lie in the file."""


def make_index(shards: Shards, dtype: torch.dtype) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shapes in shards.values() for shape in shapes.values()]
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}


def plan_shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> Shards:
    """Which file holds what: each file at most `shard_bytes`, unless one tensor is larger."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    return {f"model-{number:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _no_safetensors(directory: Path) -> str:
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(kind))
    if pickles:
        return (
            f"{directory}: {pickles[0]} is a pickle, which can run any code when it is read; load it where you trust "
            "it, and save it with safe_serialization=True"
        )
    return f"{directory}: holds no *.safetensors file"
