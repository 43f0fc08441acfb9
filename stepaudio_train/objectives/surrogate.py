"""What PPO and GRPO share: the clipped surrogate of the policy, and how far the policy has moved."""

from __future__ import annotations

import torch
from torch import Tensor

from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import ADVANTAGES, OLD_LOG_PROBS, REFERENCE_LOG_PROBS
from stepaudio_train.objectives.advantages import kl_estimate
from stepaudio_train.objectives.base import TokenOutputs
from stepaudio_train.objectives.documents import extra, in_answers, largest_per_document, mean_metric, per_document


def clipped_surrogate(
    outputs: TokenOutputs, batch: TokenBatch, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_old (PPO, arXiv 1707.06347, equation 7; two
    bounds as in DAPO, arXiv 2503.14476, equation 10).

    Returns:
        [R, T] losses of the tokens, not weighted; and metrics, each a sum over tokens and its weight: `loss/policy`,
        `clip_fraction`, `entropy`, the distance from the old policy `kl/old_k1` and `kl/old_k3`; and `ratio_max`, the
        largest ratio of an answer, over answers.

    Raises:
        ValueError: the engine gave no entropies, or the batch lacks extras.
    """
    if outputs.entropies is None:
        raise ValueError("a policy's loss needs the entropies of its tokens")
    weights, old, advantages = batch.loss_weights, extra(batch, OLD_LOG_PROBS), extra(batch, ADVANTAGES)
    ratios = (outputs.log_probs - old).exp()
    free = -ratios * advantages
    clipped = -ratios.clamp(1 - clip_low, 1 + clip_high) * advantages
    losses = torch.maximum(free, clipped)

    inside = in_answers(batch).to(ratios.dtype)
    answers = (per_document(inside, batch) > 0).to(ratios.dtype)
    return losses, {
        "loss/policy": mean_metric(losses, weights),
        "clip_fraction": mean_metric((clipped > free).to(ratios.dtype), weights),
        "entropy": mean_metric(outputs.entropies, weights),
        "kl/old_k1": mean_metric(kl_estimate(old, outputs.log_probs, "k1"), weights),
        "kl/old_k3": mean_metric(kl_estimate(old, outputs.log_probs, "k3"), weights),
        "ratio_max": mean_metric(largest_per_document(ratios.detach() * inside, batch), answers),
    }


def reference_kl(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
    """[R, T]: k3 estimates of the distance from the reference, differentiable, not weighted (GRPO, arXiv 2402.03300,
    equation 4). As a loss on the policy's own answers, their mean gradient is that of KL(reference || policy).

    Raises:
        ValueError: the batch has no log-probabilities of a reference.
    """
    return kl_estimate(outputs.log_probs, extra(batch, REFERENCE_LOG_PROBS), "k3")
