"""A policy and a critic of its own as one engine: what steps, saves and loads the one does the same to the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.files import write_atomically
from stepaudio_train.engines.base import Engine, StepResult
from stepaudio_train.objectives.base import Objective, TokenOutputs

T = TypeVar("T")

_CRITIC, _STEPS_FILE = "critic", "steps.json"


class ActorCritic(Engine):
    """Everything is the policy's, but for steps and checkpoints, which are both models'.

    A checkpoint is the policy's own, so that whatever reads one finds the policy, with the critic's in `critic/`.
    """

    def __init__(
        self, policy: Engine, critic: Engine, critic_objective: Objective, critic_rate_at: Callable[[int], float]
    ) -> None:
        """
        Args:
            critic_objective: what the critic learns, from the policy's batches.
            critic_rate_at: its learning rate at a step, counted from 1.
        """
        self.config, self.device = policy.config, policy.device
        self.rank, self.world_size = policy.rank, policy.world_size
        self.data_parallel_rank, self.data_parallel_size = policy.data_parallel_rank, policy.data_parallel_size
        self.data_parallel_group = policy.data_parallel_group
        self._policy, self._critic = policy, critic
        self._critic_objective, self._critic_rate_at = critic_objective, critic_rate_at
        self._steps = 0

    @property
    def is_replica_main(self) -> bool:
        return self._policy.is_replica_main

    def num_parameters(self) -> int:
        """Of both models."""
        return self._policy.num_parameters() + self._critic.num_parameters()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self._policy.load_weights(weights)

    def full_weights(self, device: torch.device, every_replica: bool) -> Iterator[tuple[str, Tensor]]:
        return self._policy.full_weights(device, every_replica)

    def from_replica_main(self, value: T) -> T:
        return self._policy.from_replica_main(value)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        return self._policy.adapters()

    def without_adapters(self) -> AbstractContextManager[None]:
        return self._policy.without_adapters()

    def train_step(self, micro_batches: Sequence[TokenBatch], objective: Objective, learning_rate: float) -> StepResult:
        """The critic's step, then the policy's; at a rate of 0 the policy is measured and stays as it is.

        The result is the policy's, with the critic's metrics, and `critic/grad_norm` and `critic/learning_rate`; a
        policy that is not stepped has a gradient norm of 0. A policy's step that is not finite leaves a critic that
        has made its own.
        """
        self._steps += 1
        rate = self._critic_rate_at(self._steps)
        critic = self._critic.train_step(micro_batches, self._critic_objective, rate)
        if learning_rate > 0:
            policy = self._policy.train_step(micro_batches, objective, learning_rate)
        else:
            metrics = self._policy.evaluate(micro_batches, objective)
            loss, weight = metrics["loss"]
            policy = StepResult(loss / weight, 0.0, metrics)
        own = {"critic/grad_norm": (critic.grad_norm, 1.0), "critic/learning_rate": (rate, 1.0)}
        # Both have a `loss`; the critic's has a name of its own too.
        return StepResult(policy.loss, policy.grad_norm, {**critic.metrics, **own, **policy.metrics})

    def evaluate(self, micro_batches: Sequence[TokenBatch], objective: Objective) -> dict[str, tuple[float, float]]:
        return self._policy.evaluate(micro_batches, objective)

    def outputs(self, micro_batches: Sequence[TokenBatch], entropies: bool = False) -> list[TokenOutputs]:
        return self._policy.outputs(micro_batches, entropies)

    def save(self, directory: Path, background: bool = False) -> None:
        # Megatron-Core writes into empty folders alone.
        self._policy.save(directory, background)
        if self.is_main:
            (directory / _CRITIC).mkdir()
        self.barrier()
        self._critic.save(directory / _CRITIC, background)
        if self.is_main:
            write_atomically(directory / _CRITIC / _STEPS_FILE, json.dumps({"steps": self._steps}).encode())

    def finish_saving(self, wait: bool) -> bool:
        # Every rank has to ask both.
        policy, critic = self._policy.finish_saving(wait), self._critic.finish_saving(wait)
        return policy and critic

    def load(self, directory: Path) -> None:
        self._policy.load(directory)
        self._critic.load(directory / _CRITIC)
        self._steps = json.loads((directory / _CRITIC / _STEPS_FILE).read_text(encoding="utf-8"))["steps"]

    def barrier(self) -> None:
        self._policy.barrier()

    def any_rank(self, flag: bool) -> bool:
        return self._policy.any_rank(flag)

    def close(self) -> None:
        self._critic.close()
        self._policy.close()
