"""The optimisation loop that all encoder training shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepaudio_train.config.tokenizer import EncoderTrainConfig
from stepaudio_train.tokenizers.learning.parallel import all_sum, sum_gradients

Report = Callable[[int, dict[str, float]], None]
"""Called every step with the step's number, counted from 1, and its metrics."""


@dataclass(frozen=True)
class Term:
    """A part of the loss: a sum over this process's share of the batch, and how many things it is a sum over."""

    total: Tensor
    count: int
    weight: float = 1.0


def combine(terms: Mapping[str, Term]) -> dict[str, Tensor]:
    """Each term divided by its count over all processes, and `loss`, their weighted sum.

    The values are this process's shares: added up over the processes they are those of the whole batch.
    """
    counts = all_sum(torch.tensor([float(term.count) for term in terms.values()], device=_device(terms))).clamp(min=1)
    values = {name: term.total / count for (name, term), count in zip(terms.items(), counts, strict=True)}
    loss = torch.stack([terms[name].weight * value for name, value in values.items()]).sum()
    return {"loss": loss} | values


class Optimiser:
    """AdamW with a linear warm-up over a tenth of the steps, then a cosine to zero; gradients clipped at 1."""

    def __init__(self, modules: Iterable[nn.Module], config: EncoderTrainConfig) -> None:
        self._config = config
        self._parameters = [p for module in modules for p in module.parameters()]
        matrices = {"params": [p for p in self._parameters if p.ndim > 1], "weight_decay": config.weight_decay}
        vectors = {"params": [p for p in self._parameters if p.ndim <= 1], "weight_decay": 0.0}
        self.adamw = torch.optim.AdamW([matrices, vectors], lr=config.learning_rate, betas=(0.9, 0.98), fused=True)

    def step(self, number: int, values: Mapping[str, Tensor]) -> dict[str, float]:
        """One update; the metrics of the whole batch.

        Args:
            number: of the step, counted from 0; values: as `combine` gives them.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        rate = learning_rate_at(number, self._config)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        totals = all_sum(torch.stack([value.detach().float() for value in values.values()])).tolist()
        metrics = dict(zip(values, totals, strict=True))
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"step {number + 1}: the loss is {metrics['loss']}")
        self.adamw.zero_grad(set_to_none=True)
        values["loss"].backward()
        sum_gradients(self._parameters)
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.adamw.step()
        return metrics | {"learning_rate": rate}


def optimise(
    modules: Iterable[nn.Module], config: EncoderTrainConfig, losses: Callable[[int], dict[str, Tensor]], report: Report
) -> None:
    """All steps of a training. Errors as in `Optimiser.step`.

    Args:
        losses: step, counted from 0 -> named scalars, of which `loss` is minimised.
    """
    optimiser = Optimiser(modules, config)
    for step in range(config.steps):
        report(step + 1, optimiser.step(step, losses(step)))


def learning_rate_at(step: int, config: EncoderTrainConfig) -> float:
    """Rate of the update with this number, counted from 0."""
    warmup = max(1, config.steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _device(terms: Mapping[str, Term]) -> torch.device:
    return next(iter(terms.values())).total.device
