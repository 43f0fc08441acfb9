"""Bradley-Terry and DPO against hand-computed numbers and against loops over the pairs."""

import math
from dataclasses import replace

import pytest
import torch

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.rlhf import DpoConfig, RewardLossConfig
from stepaudio_train.data.extras import CATEGORY, MARGIN, REFERENCE_LOG_PROBS, SIDE
from stepaudio_train.objectives.dpo import DpoLoss
from stepaudio_train.objectives.reward import RewardLoss, expected_calibration_error

DPO_CONFIGS = [
    DpoConfig(),
    DpoConfig(label_smoothing=0.1, nll_weight=0.7),
    DpoConfig(form="length_normalised", beta=5),
    DpoConfig(form="simpo", beta=2, target_margin=0.6, label_smoothing=0.2, nll_weight=0.1),
]


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def last_value(document):
    return float(document["values"][document["weights"].nonzero()[-1, 0]])


def total(document, values):
    return sum(float(v) for v, w in zip(values, document["weights"], strict=True) if w)


def mean(metric):
    return float(metric[0] / metric[1])


@pytest.fixture
def four_pairs(pairs, pack):
    """The pairs, and a batch of them: other answers between the two of a pair, an empty row."""
    (a, b), (c, d), (e, f), (g, h) = made = pairs(4)
    return made, *pack([[d, a, c, b], [], [g, e, f, h]], 60)


def test_bradley_terry_by_hand(four_pairs, pack, pairs):
    (chosen, rejected), *_ = pairs(1)
    chosen["values"][chosen["weights"].nonzero()[-1]] = 2.0
    rejected["values"][rejected["weights"].nonzero()[-1]] = -1.0
    out = RewardLoss(RewardLossConfig(centring=0.01))(*pack([[chosen, rejected]], 40))
    # log(1 + e^-3) = 0.04858735, and 0.01 * (2 - 1)^2.
    assert float(out.loss_sum) == pytest.approx(0.04858735 + 0.01, abs=1e-7)
    assert out.weight_sum == 1
    assert [float(out.metrics[f"score/{name}"][0]) for name in ("chosen", "rejected", "difference")] == [2, -1, 3]
    # sigmoid(3) = 0.95257: in the last bin, and right.
    assert out.metrics["calibration/0.95"].tolist() == pytest.approx([0.95257413 - 1, 1])


def test_bradley_terry_is_the_loop_over_pairs(four_pairs):
    made, outputs, batch = four_pairs
    out = RewardLoss(RewardLossConfig(margin_scale=0.5, centring=0.1), ("a", "b", "never", "c"))(outputs, batch)
    scores = [(last_value(chosen), last_value(rejected)) for chosen, rejected in made]
    wanted = 0.0
    for (good, bad), (chosen, _) in zip(scores, made, strict=True):
        wanted += -log_sigmoid(good - bad - 0.5 * float(chosen[MARGIN][0])) + 0.1 * (good + bad) ** 2
    assert float(out.loss_sum) == pytest.approx(wanted, rel=1e-9)
    assert out.weight_sum == 4
    right = [good > bad for good, bad in scores]
    assert mean(out.metrics["accuracy"]) == sum(right) / 4
    # Categories 0, 1, 2, 0.
    assert out.metrics["accuracy/a"].tolist() == [right[0] + right[3], 2]
    assert out.metrics["accuracy/b"].tolist() == [right[1], 1]
    assert out.metrics["accuracy/never"].tolist() == [right[2], 1]
    assert out.metrics["accuracy/c"].tolist() == [0, 0]


def test_equal_scores_are_half_right(four_pairs):
    _, outputs, batch = four_pairs
    out = RewardLoss(RewardLossConfig())(replace(outputs, values=torch.zeros_like(outputs.values)), batch)
    assert mean(out.metrics["accuracy"]) == 0.5
    assert float(out.loss_sum) == pytest.approx(4 * math.log(2))


def test_expected_calibration_error_is_that_of_the_pairs(pairs, pack):
    made = pairs(200)
    out = RewardLoss(RewardLossConfig())(*pack([[pair[0], pair[1]] for pair in made], 40))
    bins: dict[int, list[tuple[float, bool]]] = {}
    for chosen, rejected in made:
        difference = last_value(chosen) - last_value(rejected)
        confidence = 1 / (1 + math.exp(-abs(difference)))
        bins.setdefault(int((confidence - 0.5) / 0.05), []).append((confidence, difference > 0))
    wanted = 0.0
    for members in bins.values():
        confidence = sum(c for c, _ in members) / len(members)
        accuracy = sum(r for _, r in members) / len(members)
        wanted += len(members) / 200 * abs(confidence - accuracy)
    metrics = {name: tuple(sums.tolist()) for name, sums in out.metrics.items()}
    assert expected_calibration_error(metrics) == pytest.approx(wanted, rel=1e-5)
    assert sum(weight for name, (_, weight) in metrics.items() if name.startswith("calibration/")) == 200


def test_dpo_by_hand(pack):
    def document(side, log_probs, reference):
        log_probs = torch.tensor(log_probs)
        weights = torch.tensor([1.0] * len(log_probs))
        extras = {"pair": weights * 3, "side": weights * side, REFERENCE_LOG_PROBS: torch.tensor(reference)}
        return {"weights": weights, "log_probs": log_probs, "entropies": weights, "values": weights, **extras}

    chosen, rejected = document(1, [-1.0, -2.0], [-2.0, -3.0]), document(0, [-4.0], [-3.0])
    row = pack([[chosen, rejected]], 5)
    # Log-ratios 2 and -1: log(1 + e^-0.3) = 0.55435524.
    out = DpoLoss(DpoConfig(beta=0.1))(*row)
    assert float(out.loss_sum) == pytest.approx(0.55435524, abs=1e-7)
    assert out.metrics["reward/margin"].tolist() == pytest.approx([0.3, 1])
    assert out.metrics["log_prob/chosen"].tolist() == [-3, 2]
    # Per token 1 and -1: log(1 + e^-2) = 0.12692801.
    assert float(DpoLoss(DpoConfig("length_normalised", beta=1))(*row).loss_sum) == pytest.approx(0.12692801, abs=1e-7)
    # Per token -1.5 and -4, less 0.5: log(1 + e^-2) again.
    out = DpoLoss(DpoConfig("simpo", beta=1, target_margin=0.5))(*row)
    assert float(out.loss_sum) == pytest.approx(0.12692801, abs=1e-7)


@pytest.mark.parametrize("config", DPO_CONFIGS)
def test_dpo_is_the_loop_over_pairs(four_pairs, config):
    made, outputs, batch = four_pairs
    out = DpoLoss(config)(outputs, batch)
    wanted, margins = 0.0, []
    for pair in made:
        rewards = []
        for document in pair:
            sums = total(document, document["log_probs"])
            if config.form != "simpo":
                sums -= total(document, document[REFERENCE_LOG_PROBS])
            rewards.append(config.beta * sums / (1 if config.form == "dpo" else float(document["weights"].sum())))
        margins.append(rewards[0] - rewards[1])
        h = margins[-1] - config.target_margin
        wanted -= (1 - config.label_smoothing) * log_sigmoid(h) + config.label_smoothing * log_sigmoid(-h)
        wanted -= config.nll_weight * total(pair[0], pair[0]["log_probs"]) / float(pair[0]["weights"].sum())
    assert float(out.loss_sum) == pytest.approx(wanted, rel=1e-6)
    assert out.weight_sum == 4
    assert mean(out.metrics["reward/margin"]) == pytest.approx(sum(margins) / 4, rel=1e-5)
    assert mean(out.metrics["accuracy"]) == sum(margin > 0 for margin in margins) / 4


@pytest.mark.parametrize("config", DPO_CONFIGS)
def test_gradients_of_dpo(pairs, pack, config):
    (a, b), (c, d) = pairs(2)
    outputs, batch = pack([[a, c, d, b]], 40)
    inside = batch.loss_weights != 0

    def loss(log_probs):
        return DpoLoss(config)(replace(outputs, log_probs=log_probs * inside), batch).loss_sum

    assert torch.autograd.gradcheck(loss, outputs.log_probs.requires_grad_())


def test_gradients_of_bradley_terry(pairs, pack):
    (a, b), (c, d) = pairs(2)
    outputs, batch = pack([[a, c, d, b]], 40)
    objective = RewardLoss(RewardLossConfig(margin_scale=1, centring=0.1))

    def loss(values):
        return objective(replace(outputs, values=values), batch).loss_sum

    assert torch.autograd.gradcheck(loss, outputs.values.requires_grad_())


def test_rows_without_pairs_weigh_nothing(pack, pairs):
    (chosen, rejected), *_ = pairs(1)
    outputs, batch = pack([[chosen, rejected], []], 40)
    empty = batch.split(1)[1]
    outputs = replace(outputs, log_probs=outputs.log_probs[1:].requires_grad_(), values=outputs.values[1:])
    outputs.values.requires_grad_()
    for objective in (DpoLoss(DpoConfig()), RewardLoss(RewardLossConfig())):
        out = objective(outputs, empty)
        assert (out.loss_sum.item(), out.weight_sum.item()) == (0, 0)
        out.loss_sum.backward()


def test_broken_pairs_are_named(pack, pairs):
    (chosen, rejected), *_ = pairs(1)
    with pytest.raises(ValueError, match="pair 7 of row 1 has 1 chosen and 0 rejected answers"):
        DpoLoss(DpoConfig())(*pack([[], [chosen]], 20))
    both = rejected | {SIDE: chosen[SIDE].new_ones(len(rejected[SIDE]))}
    with pytest.raises(ValueError, match="pair 7 of row 0 has 2 chosen and 0 rejected answers"):
        DpoLoss(DpoConfig())(*pack([[chosen, both]], 40))


def test_what_is_missing_is_named(four_pairs):
    _, outputs, batch = four_pairs

    def without(name):
        return replace(batch, extras={key: value for key, value in batch.extras.items() if key != name})

    with pytest.raises(ConfigError, match="form=dpo: needs the reference's .* type form=simpo"):
        DpoLoss(DpoConfig())(outputs, without(REFERENCE_LOG_PROBS))
    DpoLoss(DpoConfig(form="simpo"))(outputs, without(REFERENCE_LOG_PROBS))
    with pytest.raises(ValueError, match="value head"):
        RewardLoss(RewardLossConfig())(replace(outputs, values=None), batch)
    with pytest.raises(ValueError, match=r"needs extras\['category'\]"):
        RewardLoss(RewardLossConfig(), ("a",))(outputs, without(CATEGORY))
    RewardLoss(RewardLossConfig())(outputs, without(MARGIN))
