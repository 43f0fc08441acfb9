"""The contract every engine keeps: compute per-token outputs, wherever the model lives, and step the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import RunConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.objectives.base import Objective, ObjectiveOutput, TokenOutputs, needs_entropies

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same numbers on every rank."""

    loss: float
    """Nats per token over the whole global batch, before the update."""
    grad_norm: float
    """Global L2 norm before clipping."""
    metrics: dict[str, tuple[float, float]]
    """Name -> (sum, weight) over the global batch."""


class NonFiniteError(UserError):
    """The loss or the gradient of a step is not finite. Raised on every rank, before any weight is changed."""


class Judge(ABC):
    """A model that is asked and does not learn, such as a reference or a reward model: cut over the ranks like the
    engine of its configuration, without gradients and optimizer."""

    config: RunConfig
    device: torch.device
    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    data_parallel_group: dist.ProcessGroup | None = None
    """The ranks that hold what this one holds, one of each replica, in the replicas' order. None: one replica."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs."""
        return self.rank == 0

    @abstractmethod
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set all weights from Hugging Face names -> full tensors. `weights` may build each tensor when it is asked
        for; an engine asks only for what its rank holds. A value head that is not among them begins as zeros.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a shape does not fit; the message names the tensor and both shapes.
        """

    @abstractmethod
    def outputs(self, micro_batches: Sequence[TokenBatch], entropies: bool = False) -> list[TokenOutputs]:
        """What the model says of this data-parallel rank's own micro-batches, one by one, without gradients: reference
        log-probabilities, rewards, values. On the engine's device, and the same on all ranks of a replica, each of
        which must call it with the same micro-batches; all replicas with as many.

        Args:
            entropies: compute them too.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave process groups, so that the program ends without warnings."""


class Engine(Judge):
    """A model, its optimizer and where they live.

    Layouts change speed and memory, never results: same weights and batches give the same losses, but for rounding.
    Weights go in and out by their Hugging Face names and shapes (models/step1/weight_map.py); the engine cuts and
    joins them.
    """

    @property
    def is_replica_main(self) -> bool:
        """True on one rank of each data-parallel replica: the one that writes the replica's loader state."""
        return True

    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters of the whole model, without padding."""

    @abstractmethod
    def full_weights(self, device: torch.device, every_replica: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, full fp32 tensor on `device`, a copy) in the map's order. Every rank must iterate,
        to the end. Adapters are merged in; a value head comes last. One tensor at a time is put together.

        Args:
            every_replica: on the main rank of every data-parallel replica, out of that replica's own parts; False: on
                rank 0 alone.
        """

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """`full_weights` on the CPU of rank 0."""
        return self.full_weights(torch.device("cpu"), every_replica=False)

    def from_replica_main(self, value: T) -> T:
        """The `value` of this replica's main rank, on all its ranks, each of which must call it. Small picklable
        objects."""
        return value

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full fp32 CPU tensor) of the adapters that `config.lora` asks for on rank 0 (names:
        models/step1/lora.py). Every rank must iterate. Nothing where all weights are trained. A value head, which is
        trained beside them, is among `full_weights` alone."""
        return iter(())

    def without_adapters(self) -> AbstractContextManager[None]:
        """While it lasts, `outputs` and `evaluate` are those of the weights that the adapters adapt: the policy that
        training began with. Every rank enters and leaves it.

        Raises:
            ValueError: all weights are trained, so the first ones are no longer there.
        """
        raise ValueError("without_adapters: the run trains all weights; load a second engine with the first ones")

    @abstractmethod
    def train_step(self, micro_batches: Sequence[TokenBatch], objective: Objective, learning_rate: float) -> StepResult:
        """Forward, backward and update on this data-parallel rank's micro-batches.

        Raises:
            NonFiniteError: on every rank, with the weights unchanged.
        """

    @abstractmethod
    def evaluate(self, micro_batches: Sequence[TokenBatch], objective: Objective) -> dict[str, tuple[float, float]]:
        """Metrics summed over this step's global batch, without gradients; the same on every rank."""

    @abstractmethod
    def save(self, directory: Path, background: bool = False) -> None:
        """Write weights and optimizer state into an existing empty directory. Every rank must call it.

        With `background`, where the engine supports it, writing goes on behind the training, and the directory is
        complete once `finish_saving` has returned True."""

    def finish_saving(self, wait: bool) -> bool:
        """True, the same on every rank, when no background saving is in flight. Every rank must call it."""
        return True

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Read what `save` wrote, at this or another layout. With adapters, the weights that they adapt have to be
        loaded first.

        Raises:
            UserError: it was written by an engine with other settings.
        """

    @abstractmethod
    def barrier(self) -> None: ...

    @abstractmethod
    def any_rank(self, flag: bool) -> bool:
        """True everywhere if `flag` is true on any rank."""


def blank_outputs(config: RunConfig, batch: TokenBatch, objective: Objective) -> TokenOutputs:
    """Zeros in place of what the model would say, to ask an objective for its metrics' names or its weight sum."""
    zeros = torch.zeros_like(batch.loss_weights)
    return TokenOutputs(
        zeros, zeros if needs_entropies(objective) else None, zeros if config.model.value_head else None
    )


def loss_of_all(outputs: TokenOutputs, output: ObjectiveOutput) -> Tensor:
    """The loss sum, as a function of both heads of a model that has two: one that the objective does not look at gets a
    gradient of zero, and not none, which reductions of gradients over ranks would wait for."""
    if outputs.values is None:
        return output.loss_sum
    return output.loss_sum + 0.0 * (outputs.values.sum() + outputs.log_probs.sum())
