"""What answers are paid: the reward model's scores, rules, and a penalty for not ending, added up by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepaudio_train.config.policy_runs import RewardSourceConfig
from stepaudio_train.rlhf.prompts import Prompt
from stepaudio_train.rlhf.rules import Said, rules_of

_LEAST_STD = 1e-6
MODEL = "model"
"""Name of the reward model among the parts."""


@dataclass(frozen=True)
class ScoreScale:
    """Where the reward model's scores lie, so that they can be brought to mean 0 and standard deviation 1.

    It is taken once, of the first answers, and stays: a scale that ran after the scores would pay a policy that has
    become better no more than before.
    """

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, scores: NDArray[np.float64]) -> ScoreScale:
        """Of scores that are all the same, the mean alone."""
        std = float(scores.std())
        return cls(float(scores.mean()), std if std > _LEAST_STD else 1.0)


@dataclass(frozen=True)
class Rewards:
    """What some answers were paid."""

    totals: NDArray[np.float64]
    """[N]: what is learned from."""
    parts: dict[str, NDArray[np.float64]]
    """Name -> [N]: what each part says, before its scale and weight."""


def rewards_of(
    config: RewardSourceConfig,
    prompts: Sequence[Prompt],
    answers: Sequence[Said],
    scores: NDArray[np.float64] | None,
    scale: ScoreScale,
) -> Rewards:
    """Pay N answers.

    Args:
        prompts: what was answered, one for each answer.
        scores: [N], the reward model's; None without one.
    """
    parts: dict[str, NDArray[np.float64]] = {}
    totals = np.array([0.0 if said.ended else -config.no_end_penalty for said in answers])
    if scores is not None:
        parts[MODEL] = scores
        totals += config.model_weight * (scores - scale.mean) / scale.std
    for name, rule in rules_of(config).items():
        parts[name] = np.array([rule(prompt, said) for prompt, said in zip(prompts, answers, strict=True)])
        totals += config.rules[name] * parts[name]
    return Rewards(totals, parts)
