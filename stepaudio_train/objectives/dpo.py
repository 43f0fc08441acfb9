"""Direct preference optimisation: a policy learns from pairs of answers without a reward model."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.rlhf import DpoConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import REFERENCE_LOG_PROBS
from stepaudio_train.objectives.base import ObjectiveOutput, TokenOutputs
from stepaudio_train.objectives.documents import Pairs, extra, mean_metric


class DpoLoss:
    """-(1 - e) log sigmoid(h) - e log sigmoid(-h) + nll_weight * NLL of the chosen answer per token, summed over pairs,
    with h = reward(chosen) - reward(rejected) - target_margin, and e the label smoothing.

    An answer's reward is beta times: log pi - log ref of the whole answer (`dpo`, arXiv 2305.18290, equation 7), the
    same per token (`length_normalised`, Tulu 3, arXiv 2411.15124), or log pi per token (`simpo`, arXiv 2405.14734,
    equation 6). The smoothing is conservative DPO's (Mitchell 2023, "A note on DPO with noisy preferences"), the NLL
    term that of arXiv 2404.19733.

    Metrics, each a sum and its weight: `loss`; `accuracy` (equal rewards count half); `reward/chosen`,
    `reward/rejected`, `reward/margin`; `log_prob/chosen` and `log_prob/rejected`, per token.
    """

    def __init__(self, config: DpoConfig) -> None:
        self.config = config

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        """
        Raises:
            ConfigError: the form needs a reference, and the batch has none.
            ValueError: the batch lacks pairs.
        """
        config = self.config
        pairs = Pairs.of(batch)
        lengths = pairs.lengths
        log_probs = pairs.sums(outputs.log_probs)
        relative = log_probs
        if config.form != "simpo":
            if REFERENCE_LOG_PROBS not in batch.extras:
                raise ConfigError(
                    [f"form={config.form}: needs the reference's log-probabilities of every answer; type form=simpo"]
                )
            relative = pairs.sums(outputs.log_probs - extra(batch, REFERENCE_LOG_PROBS))
        rewards = config.beta * (relative if config.form == "dpo" else relative / lengths)
        rejected, chosen = rewards.unbind(1)
        margins = chosen - rejected
        logits = margins - config.target_margin
        smoothing = config.label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
        losses = losses - config.nll_weight * (log_probs / lengths)[:, 1]

        ones = torch.ones_like(losses)
        metrics = {
            "loss": mean_metric(losses, ones),
            "accuracy": mean_metric((margins.sign() + 1) / 2, ones),
            "reward/chosen": mean_metric(chosen, ones),
            "reward/rejected": mean_metric(rejected, ones),
            "reward/margin": mean_metric(margins, ones),
        }
        for side, name in ((1, "chosen"), (0, "rejected")):
            metrics[f"log_prob/{name}"] = mean_metric((log_probs / lengths)[:, side], lengths[:, side])
        return ObjectiveOutput(losses.sum(), ones.sum(), metrics)
