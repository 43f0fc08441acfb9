"""An objective is a pure function of per-token outputs. It knows nothing of engines, layers or devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stepaudio_train.data.batch import TokenBatch


@dataclass(frozen=True)
class TokenOutputs:
    """What an engine computes for every target token of a batch."""

    log_probs: Tensor
    """[R, T] float32: log-probability of `batch.targets` under the model; 0 where the batch's loss weight is 0 (heads
    skip those tokens)."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """Sums over the tokens of one micro-batch; engines add them over micro-batches and data-parallel ranks."""

    loss_sum: Tensor
    """Scalar float32, differentiable. The step's loss is the global sum divided by the global `weight_sum`."""
    weight_sum: Tensor
    """Scalar float32: what the loss is divided by."""
    metrics: dict[str, Tensor]
    """Name -> [2] float32 (sum, weight), detached. The same names in the same order for every batch."""


class Objective(Protocol):
    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput: ...
