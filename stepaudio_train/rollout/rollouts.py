"""What the policy of a run answers while it learns from rewards: its present weights in a model that generates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.rollout import RolloutConfig, rollout_problems
from stepaudio_train.engines.base import Engine
from stepaudio_train.engines.precision import choose_dtype
from stepaudio_train.models.step1.weight_map import num_parameters
from stepaudio_train.rollout.generate import Generation
from stepaudio_train.rollout.replica_model import ReplicaModel
from stepaudio_train.rollout.sampling import ANSWER_ENDS, SamplingConfig
from stepaudio_train.rollout.vllm_server import VllmServer


@dataclass(frozen=True)
class Rollout:
    """One prompt's answer."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    """The answer, with the stop id if it ended."""
    ended: bool
    """Whether a stop id ended it; False: it was cut off."""


@dataclass(frozen=True)
class HandoverReport:
    """What it took to hand over the weights of the policy."""

    seconds: float
    """Until the last rank had its weights."""
    num_bytes: int
    """Of one rollout model's weights."""
    peak_extra_bytes: int
    """Of memory on this rank, beside the engine's: the rollout model, and the largest tensor on its way to it, in fp32,
    once in parts and once whole. 0 on a rank that neither generates nor writes weights for a server."""


class Generator(Protocol):
    """What generates for a policy."""

    def take_over(self, engine: Engine) -> int:
        """Take over the engine's present weights. Every rank calls it, and on return what generates has them all.

        Returns:
            As `HandoverReport.peak_extra_bytes`.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Generation]:
        """Go on from every prompt, in order. The replica's main rank calls it."""

    def weights(self) -> dict[str, Tensor]:
        """Hugging Face name -> weight, of what lies in this process."""


class RolloutModel:
    """The policy as generation sees it: one model for each data-parallel replica, on the replica's main rank.

    It generates from the first `refresh` on, with the weights of the last one.
    """

    def __init__(self, engine: Engine, config: RolloutConfig) -> None:
        """Every rank makes one. Takes the memory of the model on each replica's main rank, unless a server draws."""
        self._engine = engine
        self._sampling = SamplingConfig(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            repetition_window=config.repetition_window,
            stop_ids=ANSWER_ENDS,
        )
        precision = engine.config.engine.precision if config.dtype == "auto" else config.dtype
        self._dtype = choose_dtype(precision, engine.device)
        self._generator: Generator = (
            ReplicaModel(engine, self._dtype, config.batch_rows)
            if config.server is None
            else _server(config, self._dtype)
        )
        self._has_weights = False

    def refresh(self, engine: Engine) -> HandoverReport:
        """Take over the engine's present weights, in place, tensor by tensor; adapters merged in, a value head left
        out. Every rank calls it.

        Raises:
            UserError: on every rank; the server cannot take them over.
        """
        start = time.perf_counter()
        peak_extra_bytes = self._generator.take_over(engine)
        self._has_weights = True
        num_bytes = num_parameters(replace(engine.config.model, value_head=False)) * self._dtype.itemsize
        return HandoverReport(time.perf_counter() - start, num_bytes, peak_extra_bytes)

    def weights(self) -> dict[str, Tensor]:
        """Hugging Face name -> weight, the one that generates; empty on a rank that does not."""
        return self._generator.weights()

    def answer(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Rollout]:
        """Answers to this replica's own prompts, in their order, the same on all its ranks. Every rank of every
        replica calls it. An answer depends on its prompt, its seed and the weights, not on the other prompts.

        Args:
            prompts: token ids, at least one each.
            seeds: one a prompt.

        Raises:
            ValueError: an empty prompt, or another number of seeds than of prompts.
            RuntimeError: there was no `refresh` yet.
            UserError: another replica's answers failed.
        """
        if not self._has_weights:
            raise RuntimeError("RolloutModel.answer: has no weights yet; call refresh(engine) first")
        found: list[Rollout] | Exception = []
        if self._engine.is_replica_main:
            try:
                found = self._answered(prompts, seeds)
            except Exception as error:  # the other ranks wait for what came of it
                found = error
        found = self._engine.from_replica_main(found)
        # The replicas wait for each other's answers too.
        failed = self._engine.any_rank(isinstance(found, Exception))
        if isinstance(found, Exception):
            raise found
        if failed:
            raise UserError("another replica could not draw its answers; the log of its first rank says why")
        return found

    def _answered(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Rollout]:
        found = self._generator.generate(prompts, self._sampling, seeds)
        return [_rollout(prompt, generation) for prompt, generation in zip(prompts, found, strict=True)]


def _server(config: RolloutConfig, dtype: torch.dtype) -> VllmServer:
    problems = rollout_problems(config, "rollout")
    if problems:
        raise ConfigError(problems)
    assert config.server and config.server_model and config.server_weights
    return VllmServer(config.server, config.server_model, Path(config.server_weights), dtype, config.batch_rows)


def _rollout(prompt: Sequence[int], generation: Generation) -> Rollout:
    end = () if generation.stop_id is None else (generation.stop_id,)
    return Rollout(tuple(prompt), (*generation.ids, *end), ended=bool(end))
