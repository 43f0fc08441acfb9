"""A policy over five answers of one token learns what can be computed: the best policy under each loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepaudio_train.config.rlhf import DpoConfig, GaeConfig, GrpoConfig, PpoConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import (
    ADVANTAGES,
    OLD_LOG_PROBS,
    OLD_VALUES,
    PAIR,
    REFERENCE_LOG_PROBS,
    RETURNS,
    SIDE,
)
from stepaudio_train.objectives.advantages import gae, group_advantages, moments, shaped_rewards, whitened
from stepaudio_train.objectives.base import Objective, TokenOutputs
from stepaudio_train.objectives.dpo import DpoLoss
from stepaudio_train.objectives.grpo import GrpoLoss
from stepaudio_train.objectives.ppo import PolicyAndValueLoss

REWARDS = torch.tensor([0.0, 1.0, 0.2, -1.0, 0.5])
REFERENCE = torch.tensor([0.3, 0.1, 0.3, 0.1, 0.2])
ROWS, LENGTH = 8, 64


class Bandit:
    """A policy of five logits and a critic of one number, which answer with one token a document."""

    def __init__(self, policy: Tensor, learning_rate: float) -> None:
        self.logits, self.value = policy.log().requires_grad_(), torch.zeros((), requires_grad=True)
        self._optimizer = torch.optim.Adam([self.logits, self.value], learning_rate)

    @property
    def policy(self) -> Tensor:
        return self.logits.detach().softmax(0)

    def outputs(self, batch: TokenBatch) -> TokenOutputs:
        log_policy = self.logits.log_softmax(0)
        entropy = -(log_policy.exp() * log_policy).sum()
        ones = torch.ones_like(batch.loss_weights)
        return TokenOutputs(log_policy[batch.targets], entropy * ones, self.value * ones)

    def step(self, batch: TokenBatch, objective: Objective) -> None:
        out = objective(self.outputs(batch), batch)
        self._optimizer.zero_grad()
        (out.loss_sum / out.weight_sum).backward()
        self._optimizer.step()


def batch_of(targets: Tensor) -> TokenBatch:
    """[R, T] answers, a document each."""
    documents = torch.arange(targets.shape[1], dtype=torch.int32).expand(targets.shape)
    ones = torch.ones(targets.shape)
    return TokenBatch(targets, targets, ones, documents, torch.zeros(targets.shape, dtype=torch.int8))


def sampled(bandit: Bandit, generator: torch.Generator) -> TokenBatch:
    """Answers of the bandit, with what it and the reference say of them."""
    answers = torch.multinomial(bandit.policy, ROWS * LENGTH, replacement=True, generator=generator)
    batch = batch_of(answers.view(ROWS, LENGTH))
    outputs = bandit.outputs(batch)
    assert outputs.values is not None
    batch.extras[OLD_LOG_PROBS] = outputs.log_probs.detach()
    batch.extras[OLD_VALUES] = outputs.values.detach()
    batch.extras[REFERENCE_LOG_PROBS] = REFERENCE.log()[batch.targets]
    return batch


def learn_by_ppo(bandit: Bandit, rewards: Tensor, config: PpoConfig, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    objective = PolicyAndValueLoss(config)
    for _ in range(steps):
        batch = sampled(bandit, generator)
        extras, weights = batch.extras, batch.loss_weights
        cost = config.kl_coefficient if config.kl_as == "reward" else 0
        given = shaped_rewards(rewards[batch.targets], extras[OLD_LOG_PROBS], extras[REFERENCE_LOG_PROBS], batch, cost)
        advantages, extras[RETURNS] = gae(given, extras[OLD_VALUES], batch, GaeConfig())
        extras[ADVANTAGES] = whitened(advantages, weights, moments(advantages, weights))
        for _ in range(2):
            bandit.step(batch, objective)


def learn_by_grpo(bandit: Bandit, config: GrpoConfig, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    objective = GrpoLoss(config)
    for _ in range(steps):
        batch = sampled(bandit, generator)
        groups = torch.arange(ROWS * LENGTH) // config.group_size
        advantages = group_advantages(REWARDS[batch.targets].flatten(), groups, config.divide_by_std)
        batch.extras[ADVANTAGES] = advantages.view(ROWS, LENGTH)
        bandit.step(batch, objective)


def best_policy(cost: float) -> Tensor:
    """The maximum of mean reward - cost * KL(policy || reference)."""
    return (REFERENCE.log() + REWARDS / cost).softmax(0)


def kl(policy: Tensor, other: Tensor) -> float:
    return float((policy * (policy / other).log()).sum())


@pytest.mark.parametrize("kl_as", ["reward", "loss"])
def test_ppo_finds_the_best_answer_at_the_papers_cost(kl_as):
    bandit = Bandit(REFERENCE, learning_rate=0.1)
    learn_by_ppo(bandit, REWARDS, PpoConfig(kl_as=kl_as), 40)
    assert bandit.policy.argmax() == 1
    assert bandit.policy[1] > 0.95


def test_ppo_stops_where_reward_and_distance_balance():
    bandit = Bandit(REFERENCE, learning_rate=0.05)
    learn_by_ppo(bandit, REWARDS, PpoConfig(kl_coefficient=0.5), 80)
    assert (bandit.policy - best_policy(0.5)).abs().max() < 0.05


def test_ppo_without_rewards_stays_where_it_is():
    bandit = Bandit(REFERENCE, learning_rate=0.02)
    learn_by_ppo(bandit, torch.zeros(5), PpoConfig(), 50)
    assert kl(bandit.policy, REFERENCE) < 0.01


def test_ppo_without_rewards_goes_back_to_the_reference():
    bandit = Bandit(torch.tensor([0.1, 0.5, 0.1, 0.2, 0.1]), learning_rate=0.05)
    assert kl(bandit.policy, REFERENCE) > 0.5
    learn_by_ppo(bandit, torch.zeros(5), PpoConfig(), 60)
    assert kl(bandit.policy, REFERENCE) < 0.02


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_grpo_finds_the_best_answer(divide_by_std):
    bandit = Bandit(REFERENCE, learning_rate=0.1)
    learn_by_grpo(bandit, GrpoConfig(divide_by_std=divide_by_std), 60)
    assert bandit.policy[1] > 0.9


def test_grpo_stops_where_reward_and_distance_balance():
    """The mean gradient of k3, on the policy's own answers, is that of KL(reference || policy), not of the other."""
    cost = 1.0
    bandit = Bandit(REFERENCE, learning_rate=0.05)
    learn_by_grpo(bandit, GrpoConfig(divide_by_std=False, kl_coefficient=cost), 100)
    wanted = best_against_reverse_kl(cost)
    assert (bandit.policy - wanted).abs().max() < 0.05


def best_against_reverse_kl(cost: float) -> Tensor:
    logits: Tensor = REFERENCE.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(200):
        policy = logits.softmax(0)
        # Groups of 8 take each answer's own reward into their mean.
        loss = -7 / 8 * (policy * REWARDS).sum() - cost * (REFERENCE * policy.log()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(0)


def test_dpo_finds_the_policy_that_the_preferences_come_from():
    """Preferences of Bradley-Terry raters are explained best by ref * exp(reward / beta) (2305.18290, equation 4)."""
    config = DpoConfig(beta=0.5)
    bandit = Bandit(torch.full((5,), 0.2), learning_rate=0.1)
    batch = preferences(lambda chosen, rejected: round(40 * float((REWARDS[chosen] - REWARDS[rejected]).sigmoid())))
    objective = DpoLoss(config)
    for _ in range(80):
        bandit.step(batch, objective)
    assert (bandit.policy - best_policy(0.5)).abs().max() < 0.02


def preferences(count: Callable[[int, int], int]) -> TokenBatch:
    """`count(chosen, rejected)` pairs of every two answers, a pair a row."""
    pairs = [[a, b] for a in range(5) for b in range(5) if a != b for _ in range(count(a, b))]
    batch = batch_of(torch.tensor(pairs))
    batch.extras[PAIR] = torch.zeros(batch.targets.shape)
    batch.extras[SIDE] = torch.tensor([1.0, 0.0]).expand(batch.targets.shape)
    batch.extras[REFERENCE_LOG_PROBS] = REFERENCE.log()[batch.targets]
    return batch
