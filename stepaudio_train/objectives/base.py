"""An objective is a pure function of per-token outputs. It knows nothing of engines, layers or devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stepaudio_train.data.batch import TokenBatch


@dataclass(frozen=True)
class TokenOutputs:
    """What an engine computes for every token of a batch."""

    log_probs: Tensor
    """[R, T] float32: log-probability of `batch.targets` under the model; 0 where the batch's loss weight is 0 (heads
    skip those tokens)."""
    entropies: Tensor | None = None
    """[R, T] float32, nats: entropy of the distribution that the target is drawn from, over the whole vocabulary; 0
    where the loss weight is 0. Only for objectives that need them (`needs_entropies`). Differentiable."""
    values: Tensor | None = None
    """[R, T] float32: what the value head says after each token, those of loss weight 0 too. None for a model without
    a value head."""


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
    """May have an attribute `needs_entropies`; without it there are none."""

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput: ...


def needs_entropies(objective: Objective) -> bool:
    """Whether the engine has to compute entropies for it: the language model's head then takes two thirds longer."""
    return bool(getattr(objective, "needs_entropies", False))
