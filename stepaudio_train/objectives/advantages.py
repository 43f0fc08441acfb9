"""From rewards of answers to advantages of tokens. No gradient flows through any of it.

All functions take packed rows: documents do not see each other, and tokens outside of answers count as not there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepaudio_train.config.rlhf import GaeConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.objectives.documents import answer_ends, in_answers

KlEstimator = Literal["k1", "k2", "k3"]

_LEAST_STD = 1e-4
"""Added to a group's standard deviation, so that rounding in its rewards is not taken for a difference of answers."""
_LEAST_VARIANCE = 1e-8


def kl_estimate(log_probs: Tensor, other_log_probs: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates of KL(p || q), in nats, from tokens drawn from p (Schulman, http://joschu.net/blog/kl-approx.html).

    With r = q / p: k1 = -log r, no bias, much variance; k2 = (log r)^2 / 2, little of both; k3 = r - 1 - log r, no
    bias, never negative.

    Args:
        log_probs, other_log_probs: of one shape: of the tokens under p and under q. Differentiable in both.
    """
    log_ratios = other_log_probs - log_probs
    if estimator == "k1":
        return -log_ratios
    if estimator == "k2":
        return log_ratios.square() / 2
    return log_ratios.expm1() - log_ratios


@torch.no_grad()
def shaped_rewards(
    scores: Tensor, log_probs: Tensor, reference_log_probs: Tensor, batch: TokenBatch, kl_coefficient: float
) -> Tensor:
    """Rewards of every token: -kl_coefficient * (log pi - log ref), and the answer's score at its last token too
    (InstructGPT, arXiv 2203.02155, equation 2, token by token).

    Args:
        scores: [R, T], read at the last token of every answer: a reward model's values, or a rule's reward of a
            document at all of its tokens.
        log_probs, reference_log_probs: [R, T], of the targets, under the policy that sampled them and the reference.

    Returns:
        [R, T], 0 outside of answers.
    """
    costs = kl_coefficient * kl_estimate(log_probs, reference_log_probs, "k1")
    rewards = torch.where(answer_ends(batch), scores, torch.zeros_like(scores)) - costs
    return torch.where(in_answers(batch), rewards, torch.zeros_like(rewards))


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, batch: TokenBatch, config: GaeConfig) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) over the answer of every document.

    A_t = delta_t + gamma lambda A_t+1 with delta_t = r_t + gamma V_t+1 - V_t, where t + 1 is the answer's next token;
    after its last one, A and V are 0.

    Args:
        rewards, values: [R, T].

    Returns:
        Advantages and returns (advantages + values), [R, T] each, 0 outside of answers.
    """
    inside = in_answers(batch)
    goes_on = torch.zeros_like(inside)
    goes_on[:, :-1] = batch.documents[:, 1:] == batch.documents[:, :-1]
    zeros = torch.zeros_like(values)
    own_values = torch.where(inside, values, zeros)
    seen_values = _scan_back(own_values, (goes_on & ~inside).to(values.dtype))
    next_values = torch.where(goes_on, _shifted_left(seen_values, 1), zeros)
    deltas = torch.where(inside, rewards + config.gamma * next_values - own_values, zeros)
    # Tokens between two parts of an answer hand on what comes after them as it is.
    decays = torch.where(inside, config.gamma * config.gae_lambda, torch.ones_like(values)) * goes_on
    advantages = torch.where(inside, _scan_back(deltas, decays), zeros)
    return advantages, advantages + own_values


def moments(values: Tensor, weights: Tensor) -> Tensor:
    """[3] float64: sums of the weights, of the values and of their squares; add them over micro-batches and ranks."""
    values, weights = values.double(), weights.double()
    return torch.stack([weights.sum(), (weights * values).sum(), (weights * values.square()).sum()])


@torch.no_grad()
def whitened(values: Tensor, weights: Tensor, moments: Tensor) -> Tensor:
    """`values` less the mean, by the standard deviation; 0 where the weight is 0.

    Args:
        values, weights: of one shape.
        moments: [3], those of the whole global batch.
    """
    total, first, second = moments.double()
    mean = first / total
    variance = (second / total - mean.square()).clamp(min=0)
    scaled = ((values - mean) / (variance + _LEAST_VARIANCE).sqrt()).to(values.dtype)
    return torch.where(weights != 0, scaled, torch.zeros_like(scaled))


@torch.no_grad()
def group_advantages(rewards: Tensor, groups: Tensor, divide_by_std: bool) -> Tensor:
    """Rewards less the mean of their group, by its standard deviation (DeepSeekMath, arXiv 2402.03300, 4.1.2) or not
    (Dr. GRPO, arXiv 2503.20783). A group of equal rewards gives 0.

    Args:
        rewards: [N], an answer each.
        groups: [N] whole numbers: answers to one prompt have one number.
    """
    _, index = torch.unique(groups, return_inverse=True)
    exact = rewards.double()

    def group_means(values: Tensor) -> Tensor:
        totals = torch.zeros(len(values), dtype=values.dtype, device=values.device).index_add(0, index, values)
        return (totals / index.bincount(minlength=len(values)))[index]

    advantages = exact - group_means(exact)
    if divide_by_std:
        advantages = advantages / (group_means(advantages.square()).sqrt() + _LEAST_STD)
    return advantages.to(rewards.dtype)


def _scan_back(values: Tensor, decays: Tensor) -> Tensor:
    """y_t = values_t + decays_t y_t+1 along the rows of [R, T], in log2(T) steps: each doubles how far a token sees."""
    step = 1
    while step < values.shape[1]:
        values = values + decays * _shifted_left(values, step)
        decays = decays * _shifted_left(decays, step)
        step *= 2
    return values


def _shifted_left(values: Tensor, step: int) -> Tensor:
    return torch.nn.functional.pad(values[:, step:], (0, step))
