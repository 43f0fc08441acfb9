"""Typed, frozen configuration of the answers that a policy gives while it learns from rewards. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are drawn, and by what.

    Away from the defaults of `temperature`, `top_p`, `top_k` and `repetition_window`, answers are drawn from another
    distribution than the one whose log-probabilities are learned from.
    """

    __pydantic_config__ = _STRICT

    max_new_tokens: int = 1024
    """An answer that has not ended by then is cut off. A second of speech is 41.7 tokens."""
    temperature: float = 1.0
    """0 takes the most likely token, always; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities add up to this much; 1: among all."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0: among all."""
    repetition_window: int = 0
    """The last so many ids in which the released programs' rule counts stutters (theirs: 10); 0: no such rule."""
    batch_rows: int = 64
    """Answers that are drawn at once; memory for keys and values grows with them."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """What the weights that draw lie in. auto: what the run computes in."""
    server: str | None = None
    """Address of a vLLM server that draws instead, as http://localhost:8000 (docs/rlhf.md)."""
    server_model: str | None = None
    """The name under which it serves the model."""
    server_weights: str | None = None
    """Folder for the policy's weights, which the server sees under the same path. Weights in it are overwritten."""


def rollout_problems(config: RolloutConfig, key: str) -> list[str]:
    """What is wrong with how answers are drawn, a line each; `key` is the dotted key at which a recipe holds it."""
    rules = (
        ("max_new_tokens", config.max_new_tokens >= 1, "at least 1", 1024),
        ("temperature", 0 <= config.temperature < math.inf, "0 (greedy) or more", 1),
        ("top_p", 0 < config.top_p <= 1, "over 0 and at most 1", 1),
        ("top_k", config.top_k >= 0, "0 (all) or more", 0),
        ("repetition_window", config.repetition_window >= 0, "0 (no rule) or more", 0),
        ("batch_rows", config.batch_rows >= 1, "at least 1", 64),
    )
    problems = [
        f"{key}.{name}={getattr(config, name)}: must be {rule}; type {key}.{name}={instead}"
        for name, holds, rule, instead in rules
        if not holds
    ]
    return problems + _server_problems(config, key)


def _server_problems(config: RolloutConfig, key: str) -> list[str]:
    parts = {"server_model": config.server_model, "server_weights": config.server_weights}
    if config.server is None:
        return [
            f"{key}.{name}={value}: has no effect without a server; type {key}.server=http://HOST:PORT"
            for name, value in parts.items()
            if value is not None
        ]
    problems = [f"{key}.{name}: needed with {key}.server" for name, value in parts.items() if not value]
    if not config.server.startswith(("http://", "https://")):
        problems.append(f"{key}.server={config.server}: is no address; type {key}.server=http://HOST:PORT")
    if config.repetition_window:
        problems.append(
            f"{key}.repetition_window={config.repetition_window}: vLLM has no such rule; type {key}.repetition_window=0"
        )
    return problems
