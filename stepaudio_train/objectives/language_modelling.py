"""Next-token loss, told apart by modality and by task (paper 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from stepaudio_train.data.batch import TASKS, TokenBatch
from stepaudio_train.objectives.base import ObjectiveOutput, TokenOutputs
from stepaudio_train.tokenizers.vocabulary import Modality, Vocabulary


class LanguageModelling:
    """Weighted negative log-likelihood of the targets, in nats.

    Metrics, each a sum and its weight: `loss`, of all; `loss/text`, `loss/linguistic`, `loss/semantic`; and
    `loss/task/<task>`.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        weights = batch.loss_weights
        losses = -outputs.log_probs * weights
        detached = losses.detach()
        metrics = {"loss": torch.stack([detached.sum(), weights.sum()])}
        modalities = self.vocabulary.modality(batch.targets)
        for modality in Modality:
            chosen = modalities == modality
            metrics[f"loss/{modality.name.lower()}"] = _sums(detached, weights, chosen)
        for index, task in enumerate(TASKS):
            metrics[f"loss/task/{task}"] = _sums(detached, weights, batch.tasks == index)
        return ObjectiveOutput(losses.sum(), weights.sum(), metrics)


def _sums(losses: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return torch.stack([(losses * chosen).sum(), (weights * chosen).sum()])
