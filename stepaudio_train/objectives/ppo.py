"""Proximal policy optimisation (arXiv 1707.06347; the paper's 5.2): losses of the policy and of the critic."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stepaudio_train.config.rlhf import PpoConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import OLD_VALUES, RETURNS
from stepaudio_train.objectives.base import ObjectiveOutput, TokenOutputs
from stepaudio_train.objectives.documents import extra, mean_metric
from stepaudio_train.objectives.surrogate import clipped_surrogate, reference_kl


class PolicyLoss:
    """Clipped surrogate - entropy_coefficient * entropy, and kl_coefficient * distance from the reference where that
    is a loss and not part of the rewards; summed over tokens.

    Extras: `old_log_probs`, `advantages`, and `reference_log_probs` where kl_coefficient is over 0.

    Metrics: `loss`, those of `surrogate.clipped_surrogate`, and `kl/reference` (k3) where there is a reference.
    """

    needs_entropies = True

    def __init__(self, config: PpoConfig) -> None:
        self.config = config

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        """
        Raises:
            ValueError: the engine gave no entropies, or the batch lacks extras.
        """
        config, weights = self.config, batch.loss_weights
        losses, metrics = clipped_surrogate(outputs, batch, config.clip, config.clip)
        if config.entropy_coefficient > 0:
            losses = losses - config.entropy_coefficient * outputs.entropies
        if config.kl_coefficient > 0:
            distances = reference_kl(outputs, batch)
            metrics["kl/reference"] = mean_metric(distances, weights)
            if config.kl_as == "loss":
                losses = losses + config.kl_coefficient * distances
        metrics = {"loss": mean_metric(losses, weights), **metrics}
        return ObjectiveOutput((losses * weights).sum(), weights.sum(), metrics)


class ValueLoss:
    """Half the squared error of the critic's values, the larger one of V and of V kept within value_clip of the old V;
    summed over tokens.

    Extras: `returns`, and `old_values` where value_clip is set.

    Metrics: `loss` and `loss/value`, `value_clip_fraction`, and what `explained_variance` takes.
    """

    def __init__(self, config: PpoConfig) -> None:
        self.config = config

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        """
        Raises:
            ValueError: the model has no value head, or the batch lacks extras.
        """
        if outputs.values is None:
            raise ValueError("a critic's loss needs values: the model needs a value head")
        weights, values, returns = batch.loss_weights, outputs.values, extra(batch, RETURNS)
        losses = (values - returns).square() / 2
        clipped = losses
        if self.config.value_clip is not None:
            old = extra(batch, OLD_VALUES)
            near = old + (values - old).clamp(-self.config.value_clip, self.config.value_clip)
            clipped = (near - returns).square() / 2
        clip_fraction = mean_metric((clipped > losses).to(losses.dtype), weights)
        losses = torch.maximum(losses, clipped)
        loss = mean_metric(losses, weights)
        errors = returns - values
        metrics = {
            "loss": loss,
            "loss/value": loss,
            "value_clip_fraction": clip_fraction,
            "value/return": mean_metric(returns, weights),
            "value/squared_return": mean_metric(returns.square(), weights),
            "value/error": mean_metric(errors, weights),
            "value/squared_error": mean_metric(errors.square(), weights),
        }
        return ObjectiveOutput((losses * weights).sum(), weights.sum(), metrics)


class PolicyAndValueLoss:
    """PolicyLoss + value_coefficient * ValueLoss, for a policy and a critic that are one model. Metrics of both."""

    needs_entropies = True

    def __init__(self, config: PpoConfig) -> None:
        self.config = config
        self._policy, self._value = PolicyLoss(config), ValueLoss(config)

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        policy, value = self._policy(outputs, batch), self._value(outputs, batch)
        loss_sum = policy.loss_sum + self.config.value_coefficient * value.loss_sum
        loss = torch.stack([loss_sum, policy.weight_sum.to(loss_sum.dtype)]).detach().float()
        return ObjectiveOutput(loss_sum, policy.weight_sum, {**policy.metrics, **value.metrics, "loss": loss})


def explained_variance(metrics: Mapping[str, tuple[float, float]]) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that knows the mean alone; nan where
    all returns are equal.

    Args:
        metrics: name -> (sum, weight) of `ValueLoss` over the global batch, such as `StepResult.metrics`.
    """
    kinds = ("return", "squared_return", "error", "squared_error")
    mean, square, error, squared_error = (metrics[f"value/{kind}"][0] / metrics[f"value/{kind}"][1] for kind in kinds)
    variance = square - mean**2
    return 1 - (squared_error - error**2) / variance if variance > 0 else float("nan")
