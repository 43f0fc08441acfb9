"""Typed, frozen configuration of the losses that learn from preferences and rewards. Imports no torch.

The defaults are the paper's (5.2) where it gives figures. Problems are told under `key`, the dotted key at which a
recipe holds the part.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class RewardLossConfig:
    """Bradley-Terry loss of a reward model."""

    __pydantic_config__ = _STRICT

    margin_scale: float = 0.0
    """A pair's scores must differ by this times the difference of its ratings (LLaMA 2, arXiv 2307.09288, equation 2).
    0: by any amount."""
    centring: float = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around 0 (arXiv 2312.09244 uses 0.01)."""


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation."""

    __pydantic_config__ = _STRICT

    form: Literal["dpo", "length_normalised", "simpo"] = "dpo"
    """dpo: log-probabilities of whole answers, against a reference (arXiv 2305.18290). length_normalised: the same per
    token. simpo: per token, without a reference (arXiv 2405.14734)."""
    beta: float = 0.1
    """How sharply rewards follow from log-probabilities. Per token they are small: length_normalised took 5 (Tulu 3,
    arXiv 2411.15124), simpo 2 to 2.5."""
    target_margin: float = 0.0
    """`simpo` only: by how much rewards must differ, its gamma; its authors try 0.25 to 0.4 times beta."""
    label_smoothing: float = 0.0
    """Share of the pairs that is taken to be labelled the wrong way round."""
    nll_weight: float = 0.0
    """Weight of the chosen answer's negative log-likelihood per token (arXiv 2404.19733 uses 1)."""


@dataclass(frozen=True)
class GaeConfig:
    """Generalised advantage estimation (arXiv 1506.02438)."""

    __pydantic_config__ = _STRICT

    gamma: float = 1.0
    """What a reward counts one token earlier."""
    gae_lambda: float = 0.95
    """0 trusts the critic alone, 1 the rewards alone."""


@dataclass(frozen=True)
class PpoConfig:
    """Proximal policy optimisation (arXiv 1707.06347) with the paper's figures (5.2)."""

    __pydantic_config__ = _STRICT

    clip: float = 0.2
    """A token's probability pays by changing up to this share of it."""
    kl_coefficient: float = 0.05
    """What a nat of distance from the reference costs. 0: no reference."""
    kl_as: Literal["reward", "loss"] = "reward"
    """Where it is paid: taken off every token's reward, or added to the policy's loss."""
    entropy_coefficient: float = 0.0
    """What a nat of entropy pays."""
    value_clip: float | None = 0.2
    """The critic learns nothing by going further than this from what it said before; None: it may."""
    value_coefficient: float = 0.1
    """Weight of the value loss where policy and critic are one model. No effect on two."""


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300)."""

    __pydantic_config__ = _STRICT

    group_size: int = 8
    """Answers to one prompt, which are judged against each other."""
    divide_by_std: bool = True
    """Advantages in standard deviations of the group; false: in rewards (Dr. GRPO, arXiv 2503.20783)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """DAPO (arXiv 2503.14476) lets rare tokens grow further with 0.28."""
    kl_coefficient: float = 0.04
    """What a nat of distance from the reference costs, in the loss. 0: no reference."""
    normalisation: Literal["token", "sequence"] = "token"
    """token: every token counts the same (DAPO). sequence: every answer does, as in DeepSeekMath."""


def reward_loss_problems(config: RewardLossConfig, key: str) -> list[str]:
    """What is wrong with the reward model's loss, a line each."""
    return _not_negative(config, key, "margin_scale", "centring")


def dpo_problems(config: DpoConfig, key: str) -> list[str]:
    """What is wrong with DPO's loss, a line each."""
    problems = _not_negative(config, key, "target_margin", "nll_weight")
    if not 0 < config.beta < math.inf:
        problems.append(f"{key}.beta={config.beta}: must be over 0; type {key}.beta=0.1")
    if not 0 <= config.label_smoothing < 0.5:
        problems.append(
            f"{key}.label_smoothing={config.label_smoothing}: must be 0 or more and under 0.5, where labels say "
            f"nothing; type {key}.label_smoothing=0"
        )
    if config.target_margin > 0 and config.form != "simpo":
        problems.append(
            f"{key}.target_margin={config.target_margin}: is simpo's; type {key}.form=simpo, or {key}.target_margin=0"
        )
    return problems


def gae_problems(config: GaeConfig, key: str) -> list[str]:
    """What is wrong with the advantages' estimation, a line each."""
    return [
        f"{key}.{name}={value}: must be 0 to 1; type {key}.{name}={GaeConfig.__dataclass_fields__[name].default}"
        for name, value in (("gamma", config.gamma), ("gae_lambda", config.gae_lambda))
        if not 0 <= value <= 1
    ]


def ppo_problems(config: PpoConfig, key: str) -> list[str]:
    """What is wrong with PPO's losses, a line each."""
    problems = _not_negative(config, key, "kl_coefficient", "entropy_coefficient", "value_coefficient")
    if not 0 < config.clip < 1:
        problems.append(f"{key}.clip={config.clip}: must be over 0 and under 1; type {key}.clip=0.2")
    if config.value_clip is not None and not 0 < config.value_clip < math.inf:
        problems.append(f"{key}.value_clip={config.value_clip}: must be over 0; type {key}.value_clip=null for none")
    if config.kl_as == "loss" and config.kl_coefficient == 0:
        problems.append(f"{key}.kl_as=loss: costs nothing with {key}.kl_coefficient=0; type {key}.kl_as=reward")
    return problems


def grpo_problems(config: GrpoConfig, key: str) -> list[str]:
    """What is wrong with GRPO's loss, a line each."""
    problems = _not_negative(config, key, "kl_coefficient")
    if config.group_size < 2:
        problems.append(
            f"{key}.group_size={config.group_size}: must be at least 2, since an answer is judged against the others "
            f"to its prompt; type {key}.group_size=8"
        )
    if not 0 < config.clip_low < 1:
        problems.append(f"{key}.clip_low={config.clip_low}: must be over 0 and under 1; type {key}.clip_low=0.2")
    if not 0 < config.clip_high < math.inf:
        problems.append(f"{key}.clip_high={config.clip_high}: must be over 0; type {key}.clip_high=0.2")
    return problems


def _not_negative(config: RewardLossConfig | DpoConfig | PpoConfig | GrpoConfig, key: str, *names: str) -> list[str]:
    return [
        f"{key}.{name}={getattr(config, name)}: must be 0 or more; type {key}.{name}=0"
        for name in names
        if not 0 <= getattr(config, name) < math.inf
    ]
