"""The optimisation loop that both encoders share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from stepaudio_train.config.tokenizer import EncoderTrainConfig

Report = Callable[[int, dict[str, float]], None]
"""Called every step with the step's number, counted from 1, and its metrics."""


def optimise(
    modules: Iterable[nn.Module], config: EncoderTrainConfig, losses: Callable[[int], dict[str, Tensor]], report: Report
) -> None:
    """AdamW with a linear warm-up over a tenth of the steps, then a cosine to zero; gradients clipped at 1.

    Args:
        losses: step, counted from 0 -> named scalars, of which `loss` is minimised.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = [p for module in modules for p in module.parameters()]
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    for step in range(config.steps):
        rate = learning_rate_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        values = losses(step)
        if not math.isfinite(values["loss"].item()):
            raise FloatingPointError(f"step {step + 1}: the loss is {values['loss'].item()}")
        optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        report(step + 1, {name: float(value.detach()) for name, value in values.items()} | {"learning_rate": rate})


def learning_rate_at(step: int, config: EncoderTrainConfig) -> float:
    """Rate of the update with this number, counted from 0."""
    warmup = max(1, config.steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
