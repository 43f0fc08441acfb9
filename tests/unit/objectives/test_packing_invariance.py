"""The same answers in other rows, or in other micro-batches, give the same sums and the same metrics."""

from dataclasses import fields

import pytest
import torch

from stepaudio_train.config.rlhf import DpoConfig, GrpoConfig, PpoConfig, RewardLossConfig
from stepaudio_train.objectives.base import TokenOutputs
from stepaudio_train.objectives.dpo import DpoLoss
from stepaudio_train.objectives.grpo import GrpoLoss
from stepaudio_train.objectives.ppo import PolicyAndValueLoss
from stepaudio_train.objectives.reward import RewardLoss

OBJECTIVES = [
    RewardLoss(RewardLossConfig(margin_scale=1, centring=0.1), ("a", "b", "c")),
    DpoLoss(DpoConfig(label_smoothing=0.1, nll_weight=0.5)),
    DpoLoss(DpoConfig("simpo", beta=2)),
    PolicyAndValueLoss(PpoConfig(kl_as="loss", entropy_coefficient=0.1)),
    GrpoLoss(GrpoConfig()),
    GrpoLoss(GrpoConfig(normalisation="sequence")),
]


def summed(objective, micro_batches):
    """What an engine adds up: loss, weight and metrics, float64."""
    made = [objective(outputs, batch) for outputs, batch in micro_batches]
    names = list(made[0].metrics)
    assert all(list(out.metrics) == names for out in made), "the same names in the same order for every batch"
    assert all(m.dtype == torch.float32 and not m.requires_grad for out in made for m in out.metrics.values())
    vectors = [torch.cat([torch.stack([o.loss_sum, o.weight_sum]), *o.metrics.values()]).double() for o in made]
    return torch.stack(vectors).sum(0)


def by_rows(outputs, batch, rows):
    parts = zip(*(getattr(outputs, f.name).split(rows) for f in fields(TokenOutputs)), strict=True)
    return [(TokenOutputs(*part), piece) for part, piece in zip(parts, batch.split(rows), strict=True)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_rows_and_micro_batches_change_nothing(objective, pairs, pack):
    made = pairs(8)
    alone = summed(objective, [pack([list(pair)], 40) for pair in made])
    a, b, c, d, e, f, g, h = made
    packed = pack([[b[1], d[0], b[0], d[1]], [], [*reversed(a), *c, *h], [f[0], e[0], g[0], e[1], g[1], f[1]]], 90)
    torch.testing.assert_close(summed(objective, [packed]), alone, rtol=1e-6, atol=1e-6)
    for rows in (1, 2, 3):
        torch.testing.assert_close(summed(objective, by_rows(*packed, rows)), alone, rtol=1e-6, atol=1e-6)
