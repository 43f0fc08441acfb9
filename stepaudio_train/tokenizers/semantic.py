"""Semantic tokenizer: a Whisper-style encoder with vector quantisation at its end, 25 tokens/s (paper 3.1).

Module and tensor names are those of the released tokenizer as s3tokenizer holds it, so that a released state dict fits
a module of the released sizes. Shapes: B clips, F mel frames (10 ms), T tokens (40 ms), D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.audio.features import batches_of_like_length, length_mask, log_mel, normalise_log_mel, pad_clips
from stepaudio_train.config.tokenizer import SemanticConfig
from stepaudio_train.tokenizers.precision import Conv1d, Linear

FRAMES_PER_TOKEN = 4
SAMPLES_PER_TOKEN = 640
"""Samples at 16 kHz of one token: 40 ms."""
BATCH_FRAMES = 6000
"""Mel frames, padding included, that are encoded together when nothing is learned: 60 s."""
_INITIAL_GAIN = 3.0


class Attention(nn.Module):
    """Self-attention; keys have no bias."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(hidden_size, hidden_size)
        self.key = Linear(hidden_size, hidden_size, bias=False)
        self.value = Linear(hidden_size, hidden_size)
        self.out = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, D], mask [B, T] bool of the keys (None: all count) -> [B, T, D]."""
        projected = (self.query(x), self.key(x), self.value(x))
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in projected]
        context = F.scaled_dot_product_attention(*heads, attn_mask=None if mask is None else mask[:, None, None])
        return self.out(context.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm Transformer block."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.attn_ln = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(Linear(hidden_size, 4 * hidden_size), nn.GELU(), Linear(4 * hidden_size, hidden_size))
        self.mlp_ln = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, D], mask as in `Attention.forward` -> [B, T, D]."""
        x = x + self.attn(self.attn_ln(x), mask)
        return x + self.mlp(self.mlp_ln(x))


class WhisperEncoder(nn.Module):
    """Two strided convolutions (100 -> 25 frames/s), then Transformer blocks. No norm at the end."""

    positional_embedding: Tensor

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.conv1 = Conv1d(config.num_mel_bins, size, 3, stride=2, padding=1)
        self.conv2 = Conv1d(size, size, 3, stride=2, padding=1)
        # With torch's own initial weights, what comes out is a tenth as large as the position encoding, and training is
        # slow to look beyond that: word errors after 500 steps on spoken digits were 22%, and 2.5% with this.
        for convolution in (self.conv1, self.conv2):
            convolution.weight.data.mul_(_INITIAL_GAIN)
        self.register_buffer("positional_embedding", sinusoids(config.max_positions, size))
        self.blocks = nn.ModuleList([Block(size, config.num_heads) for _ in range(config.num_blocks)])

    def forward(self, mel: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised log-mel [B, F, mel bins] (zero past the end), frames [B] -> [B, T, D], tokens [B]."""
        x = F.gelu(self.conv1(mel.transpose(1, 2)))
        half = (num_frames + 1) // 2
        x = F.gelu(self.conv2(x * length_mask(half, x.shape[2])[:, None])).transpose(1, 2)
        counts = num_tokens(num_frames)
        # Clips of one length need no mask, and attention without one is faster.
        mask = None if bool((counts == x.shape[1]).all()) else length_mask(counts, x.shape[1])
        x = x + self.positional_embedding[: x.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return x, counts


class EuclideanCodebook(nn.Module):
    """Codes as points; a vector is named by the nearest one."""

    embed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.zeros(size, dim))

    def encode(self, x: Tensor) -> Tensor:
        """[..., D] -> ids [...] int64; the lowest index among equals."""
        return (x @ self.embed.T - self.embed.square().sum(1) / 2).argmax(dim=-1)


class VectorQuantisation(nn.Module):
    """L2-normalises, then looks up the codebook."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self._codebook = EuclideanCodebook(size, dim)

    @property
    def codes(self) -> Tensor:
        """[codes, D]."""
        return self._codebook.embed

    @staticmethod
    def normalise(hidden: Tensor) -> Tensor:
        """[..., D] of unit length; what codes are compared with."""
        return F.normalize(hidden.float(), dim=-1)

    def encode(self, hidden: Tensor) -> Tensor:
        """[..., D] encoder output -> ids [...] int64."""
        return self._codebook.encode(self.normalise(hidden))


class SemanticTokenizer(nn.Module):
    """From 16 kHz samples to codes, 25 a second: ((frames + 1) // 2 + 1) // 2 for each clip."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = WhisperEncoder(config)
        self.quantizer = VectorQuantisation(config.codebook_size, config.hidden_size)

    def features(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N] samples -> log10 mel power [B, F, mel bins], not yet normalised, and frame counts [B]."""
        return log_mel(waveforms, num_samples, self.config.num_mel_bins)

    def encode_features(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Log10 mel power -> encoder output [B, T, D] before quantisation, and counts [B]."""
        return self.encoder(normalise_log_mel(features, num_frames), num_frames)

    @torch.inference_mode()
    def encode_clips(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Ids [T_i] int64 of clips given by their log10 mel power [F_i, mel bins], each of at most 4 * max_positions.

        Clips of like length are encoded together, `BATCH_FRAMES` at a time, in whatever order they come.
        """
        ids: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * len(features)
        for batch in batches_of_like_length([len(clip) for clip in features], BATCH_FRAMES):
            hidden, counts = self.encode_features(*pad_clips([features[index] for index in batch]))
            for index, row, count in zip(batch, self.quantizer.encode(hidden), counts.tolist(), strict=True):
                ids[index] = row[:count]
        return ids

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, T] int64 and how many of them are the clip's own [B].

        Args:
            waveforms: [B, N] float32, 16 kHz, peak-normalised, zero-padded; num_samples: [B] int64, each over 200.
        """
        with torch.inference_mode():
            features, num_frames = self.features(waveforms, num_samples)
            ids = self.encode_clips([row[:count] for row, count in zip(features, num_frames.tolist(), strict=True)])
            return nn.utils.rnn.pad_sequence(ids, batch_first=True), num_tokens(num_frames)


def num_tokens(num_frames: Tensor) -> Tensor:
    """Tokens that the two strided convolutions make of mel frames."""
    return ((num_frames + 1) // 2 + 1) // 2


def sinusoids(length: int, channels: int) -> Tensor:
    """[length, channels] position encoding; positions count from 0, sines fill the first half."""
    half = channels // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
