"""Impossible settings of the losses are refused with the key, the value and what to type."""

import math
from dataclasses import replace

import pytest

from stepaudio_train.config.rlhf import (
    DpoConfig,
    GaeConfig,
    GrpoConfig,
    PpoConfig,
    RewardLossConfig,
    dpo_problems,
    gae_problems,
    grpo_problems,
    ppo_problems,
    reward_loss_problems,
)

CHECKS = [
    (reward_loss_problems, RewardLossConfig()),
    (dpo_problems, DpoConfig()),
    (gae_problems, GaeConfig()),
    (ppo_problems, PpoConfig()),
    (grpo_problems, GrpoConfig()),
]


@pytest.mark.parametrize(("problems", "config"), CHECKS, ids=lambda value: type(value).__name__)
def test_the_defaults_are_possible(problems, config):
    assert problems(config, "loss") == []


def test_the_papers_figures_are_the_defaults():
    assert (PpoConfig().clip, PpoConfig().kl_coefficient) == (0.2, 0.05)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"beta": 0.0}, "dpo.beta=0.0: must be over 0; type dpo.beta=0.1"),
        ({"beta": -1.0}, "dpo.beta=-1.0: must be over 0; type dpo.beta=0.1"),
        ({"beta": math.nan}, "dpo.beta=nan: must be over 0; type dpo.beta=0.1"),
        ({"label_smoothing": 0.5}, "dpo.label_smoothing=0.5: must be 0 or more and under 0.5"),
        ({"label_smoothing": -0.1}, "dpo.label_smoothing=-0.1: must be 0 or more and under 0.5"),
        ({"nll_weight": -1.0}, "dpo.nll_weight=-1.0: must be 0 or more; type dpo.nll_weight=0"),
        ({"target_margin": 1.0}, "dpo.target_margin=1.0: is simpo's; type dpo.form=simpo"),
    ],
)
def test_impossible_dpo(changed, told):
    (problem,) = dpo_problems(replace(DpoConfig(), **changed), "dpo")
    assert problem.startswith(told)


def test_simpo_has_a_margin():
    assert dpo_problems(DpoConfig(form="simpo", beta=2, target_margin=1), "dpo") == []


def test_a_group_of_one_has_nobody_to_be_better_than():
    (problem,) = grpo_problems(GrpoConfig(group_size=1), "grpo")
    assert problem.startswith("grpo.group_size=1: must be at least 2")


def test_all_problems_are_told_at_once():
    config = GrpoConfig(group_size=0, clip_low=1.0, clip_high=0.0, kl_coefficient=math.inf)
    assert len(grpo_problems(config, "grpo")) == 4
    config = PpoConfig(clip=0.0, value_clip=0.0, kl_as="loss", kl_coefficient=0, entropy_coefficient=-1)
    assert len(ppo_problems(config, "ppo")) == 4
    assert gae_problems(GaeConfig(gamma=1.5, gae_lambda=-0.1), "gae") == [
        "gae.gamma=1.5: must be 0 to 1; type gae.gamma=1.0",
        "gae.gae_lambda=-0.1: must be 0 to 1; type gae.gae_lambda=0.95",
    ]
    assert len(reward_loss_problems(RewardLossConfig(margin_scale=-1, centring=math.nan), "loss")) == 2
