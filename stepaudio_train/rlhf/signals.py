"""From rewards to what each token learns: the extras of PPO's and GRPO's losses. Pure functions of packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepaudio_train.config.policy_runs import GrpoRunConfig, PpoRunConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import ADVANTAGES, OLD_LOG_PROBS, OLD_VALUES, REFERENCE_LOG_PROBS, RETURNS
from stepaudio_train.objectives.advantages import gae, group_advantages, moments, shaped_rewards, whitened

Spread = Callable[[NDArray[np.float64]], Tensor]
"""[N] numbers of answers -> [R, T], each at all tokens of its answer's document."""


class Signals(Protocol):
    """What an algorithm adds to an iteration's answers."""

    def __call__(self, batch: TokenBatch, totals: NDArray[np.float64], spread: Spread) -> dict[str, Tensor]:
        """
        Args:
            batch: all answers, with what the old policy, the critic and the reference say in its extras.
            totals: [N] rewards of the answers, of which those to one prompt stand together.

        Returns:
            Names in `TokenBatch.extras` -> [R, T].
        """


def ppo_signals(
    batch: TokenBatch, totals: NDArray[np.float64], spread: Spread, config: PpoRunConfig
) -> dict[str, Tensor]:
    """Advantages, whitened over all answers, and returns. See `Signals`."""
    extras = batch.extras
    old, coefficient = extras[OLD_LOG_PROBS], config.loss.kl_coefficient
    if coefficient > 0 and config.loss.kl_as == "reward":
        rewards = shaped_rewards(spread(totals), old, extras[REFERENCE_LOG_PROBS], batch, coefficient)
    else:
        rewards = shaped_rewards(spread(totals), old, old, batch, 0.0)
    advantages, returns = gae(rewards, extras[OLD_VALUES], batch, config.gae)
    weights = batch.loss_weights
    return {ADVANTAGES: whitened(advantages, weights, moments(advantages, weights)), RETURNS: returns}


def grpo_signals(
    batch: TokenBatch, totals: NDArray[np.float64], spread: Spread, config: GrpoRunConfig
) -> dict[str, Tensor]:
    """Every answer's advantage over the other answers to its prompt. See `Signals`."""
    groups = torch.arange(len(totals)) // config.loss.group_size
    return {ADVANTAGES: spread(group_advantages(torch.from_numpy(totals), groups, config.loss.divide_by_std).numpy())}
