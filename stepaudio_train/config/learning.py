"""Typed, frozen configuration that the speech decoder's recipes share. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class LoopConfig:
    """How long a model learns, and what is kept on the way."""

    __pydantic_config__ = _STRICT

    max_steps: int = 1000
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 100
    """Steps between measurements on held-out recordings, which are measured at the end too."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    """The newest ones."""


def loop_problems(config: LoopConfig) -> list[str]:
    """What is wrong with the numbers of a loop, a line each."""
    fields = {key: value for key, value in asdict(config).items() if key in LoopConfig.__dataclass_fields__}
    return [f"training.{key}={value}: must be at least 1" for key, value in fields.items() if value < 1]
