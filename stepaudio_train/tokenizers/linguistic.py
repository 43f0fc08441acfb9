"""Linguistic tokenizer: a SAN-M encoder whose frames are named by their nearest centroid, 16.7 tokens/s (paper 3.1).

Module and tensor names are those of Paraformer's encoder as FunASR saves it, so that a released state dict fits a
module of the released sizes. Shapes: B clips, T encoder frames (60 ms), D hidden size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.audio.features import kaldi_fbank, length_mask, stack_frames
from stepaudio_train.config.tokenizer import LinguisticConfig

_NORM_EPS = 1e-12


class SANMAttention(nn.Module):
    """Self-attention plus a memory block: a depthwise convolution over the values (SAN-M)."""

    def __init__(self, input_size: int, hidden_size: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_q_k_v = nn.Linear(input_size, 3 * hidden_size)
        self.linear_out = nn.Linear(hidden_size, hidden_size)
        self.fsmn_block = nn.Conv1d(
            hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size, bias=False
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, input], mask [B, T] bool -> [B, T, D], zero memory outside the mask."""
        query, key, value = self.linear_q_k_v(x).chunk(3, dim=-1)
        inside = value * mask[:, :, None]
        memory = _depthwise(inside, self.fsmn_block.weight) + inside
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value)]
        context = F.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None])
        return self.linear_out(context.transpose(1, 2).flatten(2)) + memory * mask[:, :, None]


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(hidden_size, ffn_size)
        self.w_2 = nn.Linear(ffn_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.relu(self.w_1(x)))


class SANMLayer(nn.Module):
    """One pre-norm layer. Where input and hidden size differ, attention has no residual path (the first layer)."""

    def __init__(self, input_size: int, config: LinguisticConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn = SANMAttention(input_size, size, config.num_heads, config.kernel_size)
        self.feed_forward = FeedForward(size, config.ffn_size)
        self.norm1 = nn.LayerNorm(input_size, eps=_NORM_EPS)
        self.norm2 = nn.LayerNorm(size, eps=_NORM_EPS)
        self.residual = input_size == size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, input], mask [B, T] bool -> [B, T, D]."""
        attended = self.self_attn(self.norm1(x), mask)
        x = x + attended if self.residual else attended
        return x + self.feed_forward(self.norm2(x))


class SANMEncoder(nn.Module):
    """Paraformer's encoder over the whole clip at once."""

    def __init__(self, config: LinguisticConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.encoders0 = nn.ModuleList([SANMLayer(config.input_size, config)])
        self.encoders = nn.ModuleList([SANMLayer(config.hidden_size, config) for _ in range(config.num_blocks - 1)])
        self.after_norm = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Stacked and normalised frames x [B, T, input], lengths [B] -> [B, T, D]; meaningless past the end."""
        mask = length_mask(lengths, x.shape[1])
        x = x * math.sqrt(self.hidden_size)
        x = x + _sinusoids(x.shape[1], x.shape[2], x.device)
        for layer in (*self.encoders0, *self.encoders):
            x = layer(x, mask)
        return self.after_norm(x)


class LinguisticTokenizer(nn.Module):
    """From 16 kHz samples to the ids of the nearest centroids, one for every 6 fbank frames."""

    cmvn_shift: Tensor
    cmvn_scale: Tensor
    centroids: Tensor

    def __init__(self, config: LinguisticConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SANMEncoder(config)
        self.register_buffer("cmvn_shift", torch.zeros(config.input_size))
        self.register_buffer("cmvn_scale", torch.ones(config.input_size))
        self.register_buffer("centroids", torch.zeros(config.codebook_size, config.hidden_size))

    def features(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N] samples -> fbank [B, frames, mel bins] in nats, and frame counts [B]."""
        return kaldi_fbank(waveforms, num_samples, self.config.num_mel_bins)

    def stack(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Fbank -> low-frame-rate frames [B, T, input], before mean and variance normalisation, and counts [B]."""
        return stack_frames(features, num_frames, self.config.lfr_window, self.config.lfr_stride)

    def encode_features(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Fbank -> encoder output [B, T, D] and counts [B]; what the centroids are compared with."""
        stacked, counts = self.stack(features, num_frames)
        return self.encoder((stacked + self.cmvn_shift) * self.cmvn_scale, counts), counts

    def quantise(self, hidden: Tensor) -> Tensor:
        """[..., D] -> ids [...] int64 of the nearest centroids (Euclidean)."""
        return nearest(hidden, self.centroids)

    @torch.inference_mode()
    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, T] int64 and how many of them are the clip's own [B].

        Args:
            waveforms: [B, N] float32, 16 kHz, peak-normalised, zero-padded; num_samples: [B] int64.
        """
        hidden, counts = self.encode_features(*self.features(waveforms, num_samples))
        return self.quantise(hidden), counts


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each channel of x [B, T, D] over time with its own taps, weight [D, 1, odd K]; same length.

    A sum of shifted products: on a CPU twice as fast as torch's grouped convolution (measured at 8 x 50 x 128, K 11).
    """
    taps = weight[:, 0].T
    padded = F.pad(x, (0, 0, len(taps) // 2, len(taps) // 2))
    total = padded[:, : x.shape[1]] * taps[0]
    for shift in range(1, len(taps)):
        total = torch.addcmul(total, padded[:, shift : shift + x.shape[1]], taps[shift])
    return total


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest row of centroids [K, D] for each of points [..., D]; the lowest index among equals."""
    scores = points @ centroids.T - centroids.square().sum(1) / 2
    return scores.argmax(dim=-1)


def _sinusoids(length: int, depth: int, device: torch.device) -> Tensor:
    """[length, depth] position encoding; positions count from 1, sines fill the first half."""
    half = depth // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / (half - 1)))
    angles = torch.arange(1, length + 1, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
