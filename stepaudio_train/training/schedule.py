"""Learning rate over the steps."""

from __future__ import annotations

import math

from stepaudio_train.config.schema import OptimizerConfig


def learning_rate_at(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Rate of the update that makes `step` (counted from 1): linear warm-up, then constant or a cosine that reaches
    `min_learning_rate` at `max_steps` (paper 4.2)."""
    peak = config.learning_rate
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.schedule == "constant":
        return peak
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    return config.min_learning_rate + (peak - config.min_learning_rate) * 0.5 * (1.0 + math.cos(math.pi * progress))
