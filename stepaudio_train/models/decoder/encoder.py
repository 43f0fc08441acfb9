"""Encoder of the flow: pre-norm Transformer blocks with relative positions, ESPnet's conformer less its convolutions.

Module and tensor names are the released ones. Shapes: B clips, T tokens, D hidden size, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.config.decoder import FlowConfig


def relative_positions(length: int, size: int, device: torch.device | None = None) -> Tensor:
    """[2 * length - 1, size] sines (even columns) and cosines (odd) of query minus key, from length - 1 down."""
    distance = torch.arange(length - 1, -length, -1, device=device, dtype=torch.float32)
    rates = torch.exp(torch.arange(0, size, 2, device=device) * (-math.log(10000.0) / size))
    angles = distance[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def align_to_keys(scores: Tensor) -> Tensor:
    """[..., T, 2T - 1] by distance, as in `relative_positions` -> [..., T, T] by key (Transformer-XL, appendix B).

    Row i needs columns T - 1 - i and on. With one more column, rows that are one shorter begin at just these.
    """
    length = scores.shape[-2]
    flat = F.pad(scores, (0, 1)).flatten(-2)[..., length - 1 : length - 1 + length * (2 * length - 1)]
    return flat.unflatten(-1, (length, 2 * length - 1))[..., :length]


class RelativeAttention(nn.Module):
    """Self-attention whose scores are (q + u) k + (q + v) p, over sqrt(head size), for p the projected distance."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        size, self.num_heads, self.dropout = config.hidden_size, config.num_heads, config.dropout
        self.linear_q = nn.Linear(size, size)
        self.linear_k = nn.Linear(size, size)
        self.linear_v = nn.Linear(size, size)
        self.linear_out = nn.Linear(size, size)
        self.linear_pos = nn.Linear(size, size, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(self.num_heads, size // self.num_heads))
        self.pos_bias_v = nn.Parameter(torch.empty(self.num_heads, size // self.num_heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, D], positions [2T - 1, D], mask [B, T] of the keys (None: all count) -> [B, T, D]."""
        query, key, value = (self._heads(linear(x)) for linear in (self.linear_q, self.linear_k, self.linear_v))
        distances = self._heads(self.linear_pos(positions)[None])
        by_distance = (query + self.pos_bias_v[:, None]) @ distances.transpose(2, 3)
        bias = align_to_keys(by_distance) / math.sqrt(query.shape[-1])
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
        context = F.scaled_dot_product_attention(
            query + self.pos_bias_u[:, None],
            key,
            value,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.linear_out(context.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, D / H]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a SiLU between."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.w_1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.dropout = nn.Dropout(config.dropout)
        self.w_2 = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(F.silu(self.w_1(x))))


class EncoderBlock(nn.Module):
    """Attention, then the feed-forward layer, each behind a norm and added to what came in."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(config)
        self.feed_forward = FeedForward(config)
        self.norm_mha = nn.LayerNorm(config.hidden_size)
        self.norm_ff = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """As `RelativeAttention.forward`."""
        x = x + self.dropout(self.self_attn(self.norm_mha(x), positions, mask))
        return x + self.dropout(self.feed_forward(self.norm_ff(x)))


class InputLayer(nn.Module):
    """Linear layer and norm in front of the blocks; `out` is the released name."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.out = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.Dropout(config.dropout))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], as large as ESPnet's position encodings expect it."""
        return self.out(x) * math.sqrt(x.shape[-1])


class ConformerEncoder(nn.Module):
    """Every token sees every token of its clip: what comes out is final only when all of the clip is there."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.embed = InputLayer(config)
        self.encoders = nn.ModuleList([EncoderBlock(config) for _ in range(config.num_blocks)])
        self.after_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Embedded tokens [B, T, D], mask [B, T] bool -> [B, T, D]."""
        positions = self.dropout(relative_positions(x.shape[1], x.shape[2], x.device).to(x.dtype))
        x = self.dropout(self.embed(x))
        for block in self.encoders:
            x = block(x, positions, mask)
        return self.after_norm(x)
