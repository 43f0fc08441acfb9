"""Answers and what is known of each of their tokens: laid into rows, measured by models, kept, and cut into updates."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from stepaudio_train.config.policy_runs import PolicyRunConfig
from stepaudio_train.data.batch import TASKS, TokenBatch
from stepaudio_train.data.files import replacing
from stepaudio_train.data.packing import Document, choose_rows, pack_rows
from stepaudio_train.engines.base import Judge
from stepaudio_train.rollout.rollouts import Rollout

T = TypeVar("T")
PerToken = list[NDArray[np.float32]]
"""Of every answer, one number a token of prompt and answer."""
_OWN = "document."
_LENGTHS = f"{_OWN}lengths"


@dataclass(frozen=True)
class Experience:
    """The answers of an iteration, the same on every rank."""

    documents: list[Document]
    """Prompt and answer, of which the answer teaches."""
    extras: dict[str, PerToken]
    """By their names in `TokenBatch.extras`."""

    def batch(self, rows: Sequence[Sequence[int]], sequence_length: int) -> TokenBatch:
        """These rows of documents, with their extras."""
        batch = pack_rows([[self.documents[index] for index in row] for row in rows], sequence_length)
        extras = {name: lay_out(values, rows, sequence_length) for name, values in self.extras.items()}
        return replace(batch, extras=extras)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All of it, every tensor of all documents one behind the other."""
        own = {
            _LENGTHS: np.array([len(document) for document in self.documents]),
            f"{_OWN}tasks": np.array([document.task for document in self.documents]),
            f"{_OWN}ids": np.concatenate([document.ids for document in self.documents]),
            f"{_OWN}loss_weights": np.concatenate([document.loss_weights for document in self.documents]),
        }
        return {**own, **{name: np.concatenate(values) for name, values in self.extras.items()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Experience:
        """The inverse of `tensors`."""
        tensors = dict(tensors)
        ends = np.cumsum(tensors.pop(_LENGTHS))[:-1]
        tasks = tensors.pop(f"{_OWN}tasks").tolist()
        split = {name: np.split(values, ends) for name, values in tensors.items()}
        own = (split.pop(f"{_OWN}ids"), split.pop(f"{_OWN}loss_weights"), tasks)
        return cls([Document(*fields) for fields in zip(*own, strict=True)], split)

    def save(self, path: Path) -> None:
        """Write all of it, whole or not at all."""
        with replacing(path) as temporary:
            save_file(self.tensors(), temporary)

    @classmethod
    def load(cls, path: Path) -> Experience:
        """Read what `save` wrote."""
        return cls.from_tensors(load_file(path))


def document_of(rollout: Rollout, task: str) -> Document:
    """The answer teaches, with what ended it."""
    ids = np.array([*rollout.prompt, *rollout.ids], np.int32)
    loss_weights = np.zeros(len(ids), np.float32)
    loss_weights[len(rollout.prompt) :] = 1
    return Document(ids, loss_weights, TASKS.index(task))


def rows_of(lengths: Sequence[int], chosen: Sequence[int], sequence_length: int, multiple: int) -> list[list[int]]:
    """The `chosen` documents in rows, as their indices; empty rows fill up to a multiple.

    Args:
        lengths: of all documents.
    """
    packed = choose_rows([lengths[index] for index in chosen], sequence_length)
    rows = [[chosen[place] for place in row] for row in packed]
    return rows + [[] for _ in range(-len(rows) % multiple)]


def row_multiple(config: PolicyRunConfig, engine: Judge) -> int:
    """Rows that all replicas share evenly, in micro-batches that the pipeline can take."""
    stages = config.engine.pipeline_parallel if config.engine.virtual_pipeline > 1 else 1
    return engine.data_parallel_size * config.training.micro_batch_rows * stages


def lay_out(values: Sequence[NDArray[np.float32]], rows: Sequence[Sequence[int]], sequence_length: int) -> Tensor:
    """[R, T] float32: the numbers of each row's documents one behind the other, then zeros."""
    laid = np.zeros((len(rows), sequence_length), np.float32)
    for number, row in enumerate(rows):
        if row:
            joined = np.concatenate([values[index] for index in row])
            laid[number, : len(joined)] = joined
    return torch.from_numpy(laid)


def take_up(laid: Tensor, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> dict[int, NDArray[np.float32]]:
    """The inverse of `lay_out`: document -> its numbers."""
    found = {}
    for values, row in zip(laid.float().cpu().numpy(), rows, strict=True):
        ends = np.cumsum([lengths[index] for index in row])
        found |= dict(zip(row, np.split(values[: ends[-1]], ends[:-1]), strict=True)) if row else {}
    return found


def own_share(items: Sequence[T], engine: Judge) -> Sequence[T]:
    """This replica's equal run of what all replicas share; the last ones have one less where it does not go up."""
    bounds = np.linspace(0, len(items), engine.data_parallel_size + 1).round().astype(int)
    return items[bounds[engine.data_parallel_rank] : bounds[engine.data_parallel_rank + 1]]


def of_all_replicas(value: T, engine: Judge) -> list[T]:
    """Every replica's `value`, which its ranks have alike, on every rank, each of which must call it. Small picklable
    objects."""
    if engine.data_parallel_size == 1:
        return [value]
    told: list[T | None] = [None] * engine.data_parallel_size
    dist.all_gather_object(told, value, engine.data_parallel_group)
    return typing.cast("list[T]", told)


def measured(
    documents: Sequence[Document],
    rows: Sequence[Sequence[int]],
    sequence_length: int,
    engine: Judge,
    measure: Callable[[TokenBatch], Mapping[str, Tensor]],
) -> dict[str, PerToken]:
    """What models say of every token of every document, the same on every rank, each of which must call it.

    Args:
        rows: of all documents; as many for each replica.
        measure: this replica's rows -> name -> [R, T].
    """
    own, lengths = own_share(rows, engine), [len(document) for document in documents]
    batch = pack_rows([[documents[index] for index in row] for row in own], sequence_length)
    found = {name: take_up(laid, own, lengths) for name, laid in measure(batch).items()}
    parts = of_all_replicas(found, engine)
    merged = {name: {k: v for part in parts for k, v in part[name].items()} for name in found}
    return {name: [values[index] for index in range(len(documents))] for name, values in merged.items()}
