"""The loss of a reward model, which tells the better of two answers by its score (paper 5.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio_train.config.rlhf import RewardLossConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import CATEGORY, MARGIN
from stepaudio_train.objectives.base import ObjectiveOutput, TokenOutputs
from stepaudio_train.objectives.documents import Pairs, extra, mean_metric

_CALIBRATION = "calibration/"
_CALIBRATION_BINS = 10


class RewardLoss:
    """Bradley-Terry: -log sigmoid(s_chosen - s_rejected - margin) + centring (s_chosen + s_rejected)^2, summed over
    pairs. An answer's score s is the model's value at the answer's last token.

    Sources: InstructGPT (arXiv 2203.02155, equation 1), the margin of LLaMA 2 (arXiv 2307.09288, equation 2), the
    centring of arXiv 2312.09244.

    Metrics, each a sum and its weight: `loss`; `accuracy` (equal scores count half) and `accuracy/<category>`;
    `score/chosen`, `score/rejected`, `score/difference`; and `calibration/<lowest confidence>`, by how much the
    model's confidence in its choice exceeds its accuracy, over the pairs with a confidence from there on.
    """

    def __init__(self, config: RewardLossConfig, categories: Sequence[str] = ()) -> None:
        """`categories`: their names by the numbers in the extras; without any, the batch needs none."""
        self.config, self.categories = config, tuple(categories)

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        """
        Raises:
            ValueError: the model has no value head, or the batch lacks extras.
        """
        if outputs.values is None:
            raise ValueError("a reward is a value: the model needs a value head")
        pairs = Pairs.of(batch)
        rejected, chosen = pairs.at_ends(outputs.values).unbind(1)
        differences = chosen - rejected
        margins: Tensor | float = 0.0
        if self.config.margin_scale > 0:
            margins = self.config.margin_scale * pairs.at_ends(extra(batch, MARGIN))[:, 1]
        losses = -F.logsigmoid(differences - margins) + self.config.centring * (chosen + rejected).square()

        ones = torch.ones_like(losses)
        right = (differences.sign() + 1) / 2
        metrics = {
            "loss": mean_metric(losses, ones),
            "accuracy": mean_metric(right, ones),
            "score/chosen": mean_metric(chosen, ones),
            "score/rejected": mean_metric(rejected, ones),
            "score/difference": mean_metric(differences, ones),
        }
        if self.categories:
            categories = pairs.at_ends(extra(batch, CATEGORY).float())[:, 1]
            for index, name in enumerate(self.categories):
                metrics[f"accuracy/{name}"] = mean_metric(right, (categories == index).to(right.dtype))
        return ObjectiveOutput(losses.sum(), ones.sum(), metrics | _calibration(differences.detach(), right))


def expected_calibration_error(metrics: Mapping[str, tuple[float, float]]) -> float:
    """Mean distance of confidence and accuracy over the confidence bins (arXiv 1706.04599, equation 3), 0 to 1.

    Args:
        metrics: name -> (sum, weight) of `RewardLoss` over all pairs, such as `Engine.evaluate` returns.
    """
    bins = [sums for name, sums in metrics.items() if name.startswith(_CALIBRATION)]
    return sum(abs(excess) for excess, _ in bins) / sum(weight for _, weight in bins)


def _calibration(differences: Tensor, right: Tensor) -> dict[str, Tensor]:
    """A metric for each bin of confidence between 0.5 and 1: the sum of confidence - accuracy, the number of pairs."""
    confidences = differences.abs().sigmoid()
    width = 0.5 / _CALIBRATION_BINS
    bins = ((confidences - 0.5) / width).long().clamp(max=_CALIBRATION_BINS - 1)
    return {
        f"{_CALIBRATION}{0.5 + width * index:.2f}": mean_metric(confidences - right, (bins == index).to(right.dtype))
        for index in range(_CALIBRATION_BINS)
    }
