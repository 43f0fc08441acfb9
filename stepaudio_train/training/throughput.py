"""Tokens per second and model FLOPs utilisation, counted causally over documents."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from stepaudio_train.config.schema import Step1Config

_PEAK_BF16_FLOPS_PER_S = {
    # Dense, from the vendors' data sheets.
    "A100": 312e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def matmul_parameters(config: Step1Config) -> int:
    """Parameters that every token is multiplied with: all but the embedding and the norms."""
    h, kv = config.hidden_size, config.num_attention_groups * config.head_dim
    layer = 2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size
    return config.num_hidden_layers * layer + h * config.vocab_size


def training_flops(config: Step1Config, num_tokens: int, squared_lengths: int) -> float:
    """FLOPs of forward and backward: 6 per matmul parameter and token, and 6 * layers * hidden per pair of tokens
    that causal attention joins twice over (sum of squared document lengths)."""
    attention = 6.0 * config.num_hidden_layers * config.hidden_size * squared_lengths
    return 6.0 * matmul_parameters(config) * num_tokens + attention


def squared_lengths(documents: Tensor) -> Tensor:
    """[R] int64: the sum over a row's documents of their length squared, of [R, T] `documents`. Padding is one."""
    num_rows = documents.shape[0]
    shifted = documents - documents.min()
    per_row = int(shifted.max()) + 1
    rows = torch.arange(num_rows, device=documents.device)[:, None]
    lengths = (rows * per_row + shifted).flatten().bincount(minlength=num_rows * per_row)
    return lengths.view(num_rows, per_row).square().sum(1)


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """What one rank could do at most: the data sheet's for a known GPU, a measured matmul on a CPU, else None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in _PEAK_BF16_FLOPS_PER_S.items() if key in name), None)
    size, rates = 1024, []
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        rates.append(2.0 * size**3 / (time.perf_counter() - start))
    # The best of several: what else runs on the machine only ever takes away.
    return max(rates)
