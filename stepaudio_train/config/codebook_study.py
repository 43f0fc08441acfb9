"""Typed, frozen configuration of the codebook study. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class CodebookStudyConfig:
    """Four models of the same size, data and steps, which differ in what they see of the two codebooks (paper 4.4)."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/codebook_study"
    """Everything is written here. A run that was stopped goes on when it is started again."""
    data_from: str = "runs/quickstart"
    """Run directory of a quick start: its folders tokenizer/ and tokens/ are what the models learn from."""
    experiment: str = "codebook_study"
    """File in configs/experiment: model, rates and batch of each of the four runs."""
    steps: int = 600
    """Of each model. A step holds about the same recordings whatever the layout."""
    sequence_length: int = 256
    """Tokens a row in the interleaved layout; rows of the others are as much shorter as their speech is."""
    seeds: int = 1
    """Models of each layout; their spread says how much of a difference is chance."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def codebook_study_problems(config: CodebookStudyConfig) -> list[str]:
    """What is wrong with a configuration, a line each."""
    positive = ("steps", "sequence_length", "seeds")
    return [f"{key}={getattr(config, key)}: must be over 0" for key in positive if getattr(config, key) <= 0]
