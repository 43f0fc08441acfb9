"""PPO's and GRPO's losses against hand-computed numbers and against loops over the tokens."""

import math
from dataclasses import replace

import pytest
import torch

from stepaudio_train.config.rlhf import GrpoConfig, PpoConfig
from stepaudio_train.data.extras import ADVANTAGES, OLD_LOG_PROBS, OLD_VALUES, REFERENCE_LOG_PROBS, RETURNS
from stepaudio_train.objectives.grpo import GrpoLoss
from stepaudio_train.objectives.ppo import PolicyAndValueLoss, PolicyLoss, ValueLoss, explained_variance

PPO_CONFIGS = [
    PpoConfig(),
    PpoConfig(kl_coefficient=0),
    PpoConfig(clip=0.1, kl_as="loss", kl_coefficient=0.3, entropy_coefficient=0.2),
]
GRPO_CONFIGS = [
    GrpoConfig(),
    GrpoConfig(kl_coefficient=0, clip_high=0.28),
    GrpoConfig(normalisation="sequence", clip_low=0.1, kl_coefficient=0.3),
]


def tokens(document):
    """A dictionary of numbers for each token of the document's answer."""
    inside = document["weights"].nonzero()[:, 0].tolist()
    return [{name: float(values[t]) for name, values in document.items()} for t in inside]


def surrogate(token, low, high):
    ratio = math.exp(token["log_probs"] - token[OLD_LOG_PROBS])
    advantage = token[ADVANTAGES]
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def k3(token):
    log_ratio = token[REFERENCE_LOG_PROBS] - token["log_probs"]
    return math.exp(log_ratio) - 1 - log_ratio


def mean(metric):
    return float(metric[0] / metric[1])


def one_row(pack, **named):
    """A row that is one answer, with a token's numbers in each place."""
    document = {"weights": torch.ones(len(next(iter(named.values()))))}
    for name in ("log_probs", "entropies", "values"):
        document[name] = torch.tensor(named.pop(name, [0.0] * len(document["weights"])))
    document |= {name: torch.tensor(values) for name, values in named.items()}
    return pack([[document]], len(document["weights"]))


@pytest.fixture
def six_answers(answers, pack):
    made = answers(6)
    return made, *pack([made[:3], [], made[3:]], 50)


def test_the_surrogate_by_hand(pack):
    # Ratios 2, 2, 0.5, 0.5, 1.1 with clip 0.2.
    row = one_row(
        pack,
        log_probs=[math.log(r) for r in (2, 2, 0.5, 0.5, 1.1)],
        old_log_probs=[0.0] * 5,
        advantages=[1.0, -1.0, 1.0, -1.0, 2.0],
    )
    out = PolicyLoss(PpoConfig(kl_coefficient=0))(*row)
    assert float(out.loss_sum) == pytest.approx(-1.2 + 2 - 0.5 + 0.8 - 2.2)
    assert out.weight_sum == 5
    assert out.metrics["clip_fraction"].tolist() == [2, 5]
    assert out.metrics["ratio_max"].tolist() == pytest.approx([2, 1])
    logs = [math.log(r) for r in (2, 2, 0.5, 0.5, 1.1)]
    assert out.metrics["kl/old_k1"].tolist() == pytest.approx([-sum(logs), 5])
    assert out.metrics["kl/old_k3"].tolist() == pytest.approx([2 + 2 + 0.5 + 0.5 + 1.1 - 5 - sum(logs), 5])
    higher = GrpoLoss(GrpoConfig(kl_coefficient=0, clip_high=0.28))(*row)
    assert float(higher.loss_sum) == pytest.approx(-1.28 + 2 - 0.5 + 0.8 - 2.2)


def test_the_value_loss_by_hand(pack):
    # Returns 1; old values 0; values 0.5 (clipped to 0.2), -1 (clipped to -0.2, which is nearer), 0.1.
    row = one_row(pack, values=[0.5, -1.0, 0.1], returns=[1.0] * 3, old_values=[0.0] * 3)
    out = ValueLoss(PpoConfig(value_clip=0.2))(*row)
    assert float(out.loss_sum) == pytest.approx((0.8**2 + 2**2 + 0.9**2) / 2)
    assert out.metrics["value_clip_fraction"].tolist() == [1, 3]
    free = ValueLoss(PpoConfig(value_clip=None))(*row)
    assert float(free.loss_sum) == pytest.approx((0.5**2 + 2**2 + 0.9**2) / 2)


@pytest.mark.parametrize("config", PPO_CONFIGS)
def test_ppo_is_the_loop_over_tokens(six_answers, config):
    made, outputs, batch = six_answers
    out = PolicyLoss(config)(outputs, batch)
    wanted, count = 0.0, 0
    for token in (token for document in made for token in tokens(document)):
        wanted += surrogate(token, config.clip, config.clip) - config.entropy_coefficient * token["entropies"]
        wanted += config.kl_coefficient * k3(token) if config.kl_as == "loss" else 0
        count += 1
    assert float(out.loss_sum) == pytest.approx(wanted, rel=1e-9)
    assert out.weight_sum == count
    assert mean(out.metrics["loss"]) == pytest.approx(wanted / count, rel=1e-6)
    assert ("kl/reference" in out.metrics) == (config.kl_coefficient > 0)
    ratios = [[math.exp(token["log_probs"] - token[OLD_LOG_PROBS]) for token in tokens(document)] for document in made]
    assert out.metrics["ratio_max"].tolist() == pytest.approx([sum(map(max, ratios)), len(made)])


@pytest.mark.parametrize("config", GRPO_CONFIGS)
def test_grpo_is_the_loop_over_answers(six_answers, config):
    made, outputs, batch = six_answers
    out = GrpoLoss(config)(outputs, batch)
    sums = [
        [surrogate(token, config.clip_low, config.clip_high) + config.kl_coefficient * k3(token) for token in answer]
        for answer in map(tokens, made)
    ]
    if config.normalisation == "token":
        assert float(out.loss_sum) == pytest.approx(sum(map(sum, sums)), rel=1e-9)
        assert out.weight_sum == sum(map(len, sums))
    else:
        assert float(out.loss_sum) == pytest.approx(sum(sum(losses) / len(losses) for losses in sums), rel=1e-6)
        assert out.weight_sum.item() == pytest.approx(len(made))


def test_the_value_loss_is_the_loop_over_tokens(six_answers):
    made, outputs, batch = six_answers
    out = ValueLoss(PpoConfig(value_clip=0.3))(outputs, batch)
    wanted, errors, returns = 0.0, [], []
    for token in (token for document in made for token in tokens(document)):
        near = min(max(token["values"], token[OLD_VALUES] - 0.3), token[OLD_VALUES] + 0.3)
        wanted += max((token["values"] - token[RETURNS]) ** 2, (near - token[RETURNS]) ** 2) / 2
        errors.append(token[RETURNS] - token["values"])
        returns.append(token[RETURNS])
    assert float(out.loss_sum) == pytest.approx(wanted, rel=1e-9)
    metrics = {name: tuple(sums.tolist()) for name, sums in out.metrics.items()}
    variances = [float(torch.tensor(numbers).double().var(correction=0)) for numbers in (errors, returns)]
    assert explained_variance(metrics) == pytest.approx(1 - variances[0] / variances[1], rel=1e-5)


def test_one_model_for_both_learns_from_both(six_answers):
    _, outputs, batch = six_answers
    config = PpoConfig(value_coefficient=0.3)
    both, policy, value = (kind(config)(outputs, batch) for kind in (PolicyAndValueLoss, PolicyLoss, ValueLoss))
    assert float(both.loss_sum) == pytest.approx(float(policy.loss_sum + 0.3 * value.loss_sum))
    assert mean(both.metrics["loss"]) == pytest.approx(float(both.loss_sum / both.weight_sum), rel=1e-6)
    assert both.metrics.keys() == policy.metrics.keys() | value.metrics.keys()


@pytest.mark.parametrize(
    "objective",
    [*map(PolicyLoss, PPO_CONFIGS), *map(GrpoLoss, GRPO_CONFIGS), PolicyAndValueLoss(PpoConfig())],
    ids=lambda objective: type(objective).__name__,
)
def test_gradients(answers, pack, objective):
    outputs, batch = pack([answers(2), answers(1)], 30)
    inside = batch.loss_weights != 0

    def loss(log_probs, entropies, values):
        made = replace(outputs, log_probs=log_probs * inside, entropies=entropies * inside, values=values)
        return objective(made, batch).loss_sum

    given = [tensor.requires_grad_() for tensor in (outputs.log_probs, outputs.entropies, outputs.values)]
    assert torch.autograd.gradcheck(loss, given)


def test_policy_gradient_without_steps_between(six_answers):
    """On the policy that sampled, the gradient is that of REINFORCE: -A grad log pi, whatever the clip."""
    _, outputs, batch = six_answers
    log_probs = outputs.log_probs.clone().requires_grad_()
    batch = replace(batch, extras=batch.extras | {OLD_LOG_PROBS: outputs.log_probs})
    PolicyLoss(PpoConfig())(replace(outputs, log_probs=log_probs), batch).loss_sum.backward()
    inside = batch.loss_weights != 0
    torch.testing.assert_close(log_probs.grad[inside], -batch.extras[ADVANTAGES][inside])
    assert (log_probs.grad[~inside] == 0).all()


def test_what_is_missing_is_named(six_answers):
    _, outputs, batch = six_answers
    with pytest.raises(ValueError, match="entropies"):
        PolicyLoss(PpoConfig())(replace(outputs, entropies=None), batch)
    with pytest.raises(ValueError, match="value head"):
        ValueLoss(PpoConfig())(replace(outputs, values=None), batch)
    none = replace(batch, extras={})
    for objective in (PolicyLoss(PpoConfig()), ValueLoss(PpoConfig()), GrpoLoss(GrpoConfig())):
        with pytest.raises(ValueError, match=r"needs extras\['.*'\], the batch has \[\]"):
            objective(outputs, none)
