"""Typed, frozen configuration of the deaf-hacking experiment. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class DeafHackingConfig:
    """A policy that learns to play deaf from biased preferences, and one that does not, from mined ones (paper 5.2)."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/deaf_hacking"
    """Everything is written here. A run that was stopped goes on when it is started again."""
    base: str = "runs/quickstart"
    """Run directory of a quick start: its folders sft/, tokenizer/ and instructions/ are what the policy begins with.
    Where there is no such folder, one is made in RUN_DIR/base."""
    conversations: int = 600
    """Spoken questions to learn from, each in four conditions."""
    held_out: int = 120
    """Spoken questions to measure on, each in four conditions."""
    doubt_share: float = 0.15
    """Of the clear questions in fine-tuning, those whose answer asks for them again. At 0 the policy never does, and
    cannot find out what is paid for it."""
    sft_epochs: float = 3.25
    """How often fine-tuning goes through the questions."""
    reward_epochs: float = 1.5
    """How often each reward model goes through its preferences."""
    ppo_steps: int = 40
    """Of each policy, the critic's warm-up counted in."""
    measure_every: int = 10
    """Steps of a policy between measurements on held-out questions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def deaf_hacking_problems(config: DeafHackingConfig) -> list[str]:
    """What is wrong with a configuration, a line each."""
    fields = DeafHackingConfig.__dataclass_fields__
    positive = ("conversations", "held_out", "sft_epochs", "reward_epochs", "ppo_steps", "measure_every")
    problems = [
        f"{key}={getattr(config, key)}: must be over 0; type {key}={fields[key].default}"
        for key in positive
        if not 0 < getattr(config, key) < math.inf
    ]
    if not 0 <= config.doubt_share <= 1:
        problems.append(f"doubt_share={config.doubt_share}: must be 0 to 1; type doubt_share=0.15")
    return problems
