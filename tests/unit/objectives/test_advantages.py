"""Advantages against hand-computed numbers and against loops over the documents."""

import math

import pytest
import torch

from stepaudio_train.config.rlhf import GaeConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.objectives.advantages import (
    gae,
    group_advantages,
    kl_estimate,
    moments,
    shaped_rewards,
    whitened,
)


def documents_of(tensor, batch):
    """The parts of [R, T] that are documents, padding among them, in order."""
    lines = zip(tensor, batch.documents, strict=True)
    return [line[places == index] for line, places in lines for index in range(int(places.max()) + 1)]


def test_gae_by_hand(pack):
    document = {
        "weights": torch.tensor([0.0, 1, 1, 0]),
        "log_probs": torch.zeros(4),
        "entropies": torch.zeros(4),
        "values": torch.tensor([9.0, 1, 2, 9]),
    }
    outputs, batch = pack([[document, document]], 10)
    rewards = torch.tensor([[5.0, 0, 4, 5, 5, 0, 4, 5, 5, 5]])
    advantages, returns = gae(rewards, outputs.values, batch, GaeConfig(gamma=0.5, gae_lambda=0.5))
    # delta_2 = 4 - 2 = 2; delta_1 = 0.5 * 2 - 1 = 0, A_1 = 0 + 0.25 * 2.
    assert advantages.tolist() == [[0, 0.5, 2, 0] * 2 + [0, 0]]
    assert returns.tolist() == [[0, 1.5, 4, 0] * 2 + [0, 0]]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_is_the_loop_over_ragged_documents(answers, pack, gamma, gae_lambda):
    outputs, batch = pack([answers(7), answers(1), answers(5), []], 90)
    rewards = torch.randn(4, 90, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    advantages, returns = gae(rewards, outputs.values, batch, GaeConfig(gamma, gae_lambda))

    parts = [documents_of(t, batch) for t in (batch.loss_weights, rewards, outputs.values, advantages, returns)]
    for weights, reward, value, advantage, ret in zip(*parts, strict=True):
        wanted, next_advantage, next_value = [0.0] * len(weights), 0.0, 0.0
        for t in reversed(range(len(weights))):
            if weights[t] == 0:
                continue
            delta = float(reward[t]) + gamma * next_value - float(value[t])
            next_advantage = wanted[t] = delta + gamma * gae_lambda * next_advantage
            next_value = float(value[t])
        assert advantage.tolist() == pytest.approx(wanted, abs=1e-12)
        assert ret.tolist() == pytest.approx([a + float(v * w) for a, v, w in zip(wanted, value, weights, strict=True)])


def test_an_answers_advantages_do_not_depend_on_its_row(answers, pack):
    documents = answers(4)
    config = GaeConfig()
    together, row = pack([documents], 60)
    packed = documents_of(gae(torch.full((1, 60), 0.1).double(), together.values, row, config)[0], row)
    for document, advantages in zip(documents, packed[:4], strict=True):
        alone, own = pack([[document]], len(document["weights"]))
        found = gae(torch.full(own.loss_weights.shape, 0.1).double(), alone.values, own, config)[0]
        torch.testing.assert_close(found[0], advantages, rtol=1e-12, atol=1e-12)


def test_long_rows_in_float32_are_as_exact_as_float32_is():
    length = 5000
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 1, length, generator=generator)
    ids = torch.zeros(1, length, dtype=torch.int64)
    batch = TokenBatch(ids, ids, torch.ones(1, length), ids.int(), ids.to(torch.int8))
    single = gae(rewards, values, batch, GaeConfig())[0]
    double = gae(rewards.double(), values.double(), batch, GaeConfig())[0]
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_shaped_rewards_pay_at_the_end_and_cost_everywhere(pack):
    document = {
        "weights": torch.tensor([0.0, 1, 1, 0, 1, 0]),
        "log_probs": torch.tensor([0, -1.0, -2.0, 0, -3.0, 0]),
        "entropies": torch.zeros(6),
        "values": torch.arange(6.0) + 10,
        "reference": torch.tensor([math.nan, -1.5, -1.0, math.nan, -3.0, math.nan]),
    }
    outputs, batch = pack([[document]], 8)
    rewards = shaped_rewards(outputs.values, outputs.log_probs, batch.extras["reference"], batch, 0.1)
    wanted = [0, -0.1 * 0.5, 0.1 * 1, 0, 14, 0, 0, 0]
    assert rewards[0].tolist() == pytest.approx(wanted)


def test_kl_estimators_are_right_on_average():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]], dtype=torch.float64)
    true = float((p * (p / q).log()).sum())
    for estimator in ("k1", "k3"):
        assert float((p * kl_estimate(p.log(), q.log(), estimator)).sum()) == pytest.approx(true, rel=1e-12)
    assert kl_estimate(p.log(), q.log(), "k3").min() >= 0
    # k2 is biased, but of second order where the two are close.
    close = (p + torch.tensor([1e-3, -1e-3, 0])).log()
    true = float((p * (p.log() - close)).sum())
    assert float((p * kl_estimate(p.log(), close, "k2")).sum()) == pytest.approx(true, rel=2e-2)
    assert kl_estimate(torch.tensor(-1.0), torch.tensor(-3.0), "k2").item() == 2.0


def test_whitening_is_global_however_the_sums_came_together():
    generator = torch.Generator().manual_seed(0)
    values = 100 + 3 * torch.randn(6, 40, generator=generator)
    weights = (torch.rand(6, 40, generator=generator) < 0.6).float()
    total = sum(moments(v, w) for v, w in zip(values.split(2), weights.split(2), strict=True))
    result = whitened(values, weights, total)
    chosen = values[weights > 0].double()
    wanted = (chosen - chosen.mean()) / chosen.std(correction=0)
    torch.testing.assert_close(result[weights > 0].double(), wanted, rtol=1e-5, atol=1e-5)
    assert (result[weights == 0] == 0).all()
    equal = torch.full((1, 5), 0.3)
    assert whitened(equal, torch.ones(1, 5), moments(equal, torch.ones(1, 5))).abs().max() < 1e-3


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.1, 3.0, 0.1, 0.1, 5.0])
    groups = torch.tensor([7, -2, 7, -2, -2, 7])
    centred = group_advantages(rewards, groups, divide_by_std=False)
    assert centred.tolist() == [-2, 0, 0, 0, 0, 2]
    scaled = group_advantages(rewards, groups, divide_by_std=True)
    std = math.sqrt(8 / 3)
    assert scaled.tolist() == pytest.approx([-2 / std, 0, 0, 0, 0, 2 / std], rel=1e-4)
    assert scaled[[1, 3, 4]].tolist() == [0, 0, 0]


def test_rounding_in_equal_rewards_is_no_advantage():
    rewards = torch.tensor([0.5, 0.5 + 1e-6, 0.5, 0.5])
    assert group_advantages(rewards, torch.zeros(4), divide_by_std=True).abs().max() < 0.02
