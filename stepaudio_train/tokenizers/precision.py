"""Matrix products in bf16 while everything between them stays in float32."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]


class Linear(nn.Linear):
    """A linear layer that works in the type of its weights, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Conv1d(nn.Conv1d):
    """A convolution that works in the type of its weights, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def set_precision(module: nn.Module, precision: Precision) -> None:
    """Make the matrix products of a tokenizer's layers run in bf16, or leave them in float32.

    Norms, residual sums, memory blocks and the comparison with codes stay in float32.
    """
    if precision == "bf16":
        for part in module.modules():
            if isinstance(part, (Linear, Conv1d)):
                part.to(torch.bfloat16)
