"""Batches out of the policy's own answers: an iteration is answered, paid and measured once, then learned from."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.policy_runs import PolicyRunConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.render import Renderer
from stepaudio_train.engines.base import Engine
from stepaudio_train.evaluation.deafness import PhraseClassifier
from stepaudio_train.rlhf.experience import (
    Experience,
    document_of,
    lay_out,
    measured,
    of_all_replicas,
    own_share,
    row_multiple,
    rows_of,
    take_up,
)
from stepaudio_train.rlhf.metrics import Answers, answer_metrics, sample_lines
from stepaudio_train.rlhf.models import SCORES, Models
from stepaudio_train.rlhf.placement import JudgesApart
from stepaudio_train.rlhf.prompts import Prompt, PromptOrder, Prompts
from stepaudio_train.rlhf.rewards import ScoreScale, rewards_of
from stepaudio_train.rlhf.rules import Said
from stepaudio_train.rlhf.signals import Signals
from stepaudio_train.rollout.rollouts import Rollout, RolloutModel
from stepaudio_train.rollout.speech_text import written_text
from stepaudio_train.tokenizers.vocabulary import Special
from stepaudio_train.training.reference import fingerprint

_STATE_FILE, _EXPERIENCE_FILE = "rollouts.json", "experience.safetensors"
_DRAWING, _SHUFFLING = 1, 2
"""Tell apart what is drawn by (seed, iteration)."""


class RolloutLoader:
    """See `data.loader.TrainLoader`. What is drawn depends on seed and iteration, not on how many ranks there are; a
    checkpoint holds the answers in hand."""

    def __init__(
        self,
        config: PolicyRunConfig,
        models: Models,
        prompts: Prompts,
        renderer: Renderer,
        signals: Signals,
        judges_apart: JudgesApart | None = None,
    ) -> None:
        self._config, self._models, self._renderer, self._signals = config, models, renderer, signals
        self._judges_apart = judges_apart
        self._prompts = prompts
        self._rollouts = RolloutModel(models.policy, config.rollout)
        self._order = PromptOrder(len(prompts), config.data.prompts_per_iteration, config.training.seed)
        self._classifier = PhraseClassifier()
        self._iteration, self._update = -1, config.training.steps_per_iteration
        self._experience = Experience([], {})
        self._scale: ScoreScale | None = None
        self.metrics: dict[str, float] = {}
        """Of the answers in hand."""
        self.samples: list[dict[str, Any]] = []
        """The first ones."""

    def steps(self, epochs: float) -> int:
        """Updates in so many epochs; a part of an iteration counts as one."""
        return self._order.iterations(epochs) * self._config.training.steps_per_iteration

    def next_batch(self) -> TokenBatch:
        """This data-parallel rank's rows of the next update. Every rank calls it."""
        training = self._config.training
        if self._update == training.steps_per_iteration:
            self._iteration, self._update = self._iteration + 1, 0
            self._begin()
        epoch, part = divmod(self._update, training.minibatches)
        self._update += 1
        random = np.random.default_rng([training.seed, self._iteration, _SHUFFLING, epoch])
        order = random.permutation(len(self._experience.documents)).reshape(training.minibatches, -1)
        rows = own_share(self._rows(order[part].tolist()), self._models.policy)
        return self._experience.batch(rows, training.sequence_length)

    def save(self, directory: Path) -> None:
        """Write position, the reward model's scale and the answers in hand, which all ranks have alike."""
        if not self._models.policy.is_main:
            return
        state = {
            "iteration": self._iteration,
            "update": self._update,
            "scale": None if self._scale is None else asdict(self._scale),
            "metrics": self.metrics,
            "samples": self.samples,
            "made_by": self._made_by,
        }
        self._experience.save(directory / _EXPERIENCE_FILE)
        write_atomically(directory / _STATE_FILE, json.dumps(state, ensure_ascii=False).encode())

    def load(self, directory: Path) -> None:
        """Go on where the loader stood that wrote `directory`, at any data-parallel size.

        Raises:
            ConfigError: it answered other prompts, or was judged by other models.
        """
        state = json.loads((directory / _STATE_FILE).read_text(encoding="utf-8"))
        changed = [key for key, value in self._made_by.items() if state["made_by"].get(key) != value]
        if changed:
            raise ConfigError(
                [
                    f"{key}: is not what it was when {directory} was written, so that rewards would not mean the same; "
                    "set it back, or start another run from the weights with model.init"
                    for key in changed
                ]
            )
        self._iteration, self._update = state["iteration"], state["update"]
        self._scale = None if state["scale"] is None else ScoreScale(**state["scale"])
        self.metrics, self.samples = state["metrics"], state["samples"]
        self._experience = Experience.load(directory / _EXPERIENCE_FILE)

    def close(self) -> None:
        """Nothing is held open."""

    def _begin(self) -> None:
        """Answer the iteration's prompts with the policy's present weights, and find out what the answers teach."""
        start = time.perf_counter()
        config, engine = self._config, self._models.policy
        chosen = self._order.of(self._iteration)
        prompts = [self._prompts.prompts[index] for index in chosen for _ in range(config.answers_per_prompt)]
        rollouts = self._answered(prompts, engine)
        answered_s = time.perf_counter() - start

        documents = [document_of(one, prompt.task) for one, prompt in zip(rollouts, prompts, strict=True)]
        length, every = config.training.sequence_length, list(range(len(documents)))
        lengths = [len(document) for document in documents]
        rows = rows_of(lengths, every, length, row_multiple(config, engine))
        told = self._judges_apart.ask(documents) if self._judges_apart is not None else dict
        known = measured(documents, rows, length, engine, self._models.measure)
        known |= told()
        scores = self._scores(known.pop(SCORES, None))

        said = [self._said(prompt, rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)]
        rewards = rewards_of(config.reward, prompts, said, scores, self._scale or ScoreScale())
        answers = Answers(prompts, rollouts, said, rewards)
        laid = Experience(documents, known).batch(rows, length)
        found = self._signals(laid, rewards.totals, partial(_spread, lengths=lengths, rows=rows, length=length))
        taken = {name: take_up(values, rows, lengths) for name, values in found.items()}
        signals = {name: [values[index] for index in every] for name, values in taken.items()}
        self._experience = Experience(documents, {**known, **signals})
        self.samples = sample_lines(answers, self._renderer, config.training.num_samples)
        self.metrics = {
            "iteration": float(self._iteration),
            **answer_metrics(answers, self._experience, config.answers_per_prompt),
            "answering_s": answered_s,
            "measuring_s": time.perf_counter() - start - answered_s,
        }

    def _answered(self, prompts: Sequence[Prompt], engine: Engine) -> list[Rollout]:
        """All replicas' answers."""
        random = np.random.default_rng([self._config.training.seed, self._iteration, _DRAWING])
        seeds = random.integers(2**63, size=len(prompts)).tolist()
        self._rollouts.refresh(engine)
        own = own_share(list(zip(prompts, seeds, strict=True)), engine)
        found = self._rollouts.answer([prompt.ids for prompt, _ in own], [seed for _, seed in own])
        return [rollout for part in of_all_replicas(found, engine) for rollout in part]

    def _scores(self, values: Sequence[NDArray[np.float32]] | None) -> NDArray[np.float64] | None:
        """The reward model's, where each answer's last token is predicted."""
        if values is None:
            return None
        scores = np.array([float(of_answer[-2]) for of_answer in values])
        if self._scale is None:
            self._scale = ScoreScale.of(scores) if self._config.reward.normalise else ScoreScale()
        return scores

    def _said(self, prompt: Prompt, rollout: Rollout) -> Said:
        text = written_text(rollout.ids, self._renderer)
        deaf = None if prompt.condition is None else self._classifier.is_deaf(text)
        return Said(text, rollout.ids[-1] == Special.EOT, deaf)

    def _rows(self, chosen: Sequence[int]) -> list[list[int]]:
        lengths = [len(document) for document in self._experience.documents]
        multiple = row_multiple(self._config, self._models.policy)
        return rows_of(lengths, chosen, self._config.training.sequence_length, multiple)

    @cached_property
    def _made_by(self) -> dict[str, str]:
        """What rewards depend on beside the configuration, by the key that sets it."""
        made_by = {"data": self._prompts.digest()}
        if self._config.reward.model is not None:
            made_by["reward.model"] = fingerprint(self._config.reward.model)
        if self._config.kl_coefficient > 0:
            made_by["model.init"] = fingerprint(self._config.model.init)
        return made_by


def _spread(values: NDArray[np.float64], lengths: Sequence[int], rows: Sequence[Sequence[int]], length: int) -> Tensor:
    of_tokens = [np.full(n, value, np.float32) for value, n in zip(values, lengths, strict=True)]
    return lay_out(of_tokens, rows, length)
