"""Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300): PPO without a critic."""

from __future__ import annotations

from stepaudio_train.config.rlhf import GrpoConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.objectives.base import ObjectiveOutput, TokenOutputs
from stepaudio_train.objectives.documents import in_answers, mean_metric, per_document
from stepaudio_train.objectives.surrogate import clipped_surrogate, reference_kl


class GrpoLoss:
    """Clipped surrogate + kl_coefficient * distance from the reference (k3), summed over tokens (DAPO, arXiv
    2503.14476), or as the answers' means, summed over answers (`normalisation=sequence`).

    Extras: `old_log_probs`; `advantages`, an answer's own (`advantages.group_advantages`) at each of its tokens; and
    `reference_log_probs` where kl_coefficient is over 0.

    Metrics: `loss`, those of `surrogate.clipped_surrogate` over tokens, and `kl/reference` where there is a reference.
    """

    needs_entropies = True

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        """
        Raises:
            ValueError: the engine gave no entropies, or the batch lacks extras.
        """
        config, weights = self.config, batch.loss_weights
        losses, metrics = clipped_surrogate(outputs, batch, config.clip_low, config.clip_high)
        if config.kl_coefficient > 0:
            distances = reference_kl(outputs, batch)
            metrics["kl/reference"] = mean_metric(distances, weights)
            losses = losses + config.kl_coefficient * distances
        if config.normalisation == "sequence":
            totals = per_document(weights, batch).gather(1, batch.documents.long())
            weights = weights / totals.where(in_answers(batch), totals.new_ones(()))
        metrics = {"loss": mean_metric(losses, weights), **metrics}
        return ObjectiveOutput((losses * weights).sum(), weights.sum(), metrics)
