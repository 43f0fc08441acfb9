"""The network that flow matching trains: a 1-D U-Net of ResNet and Transformer blocks on mel frames (Matcha-TTS).

Module and tensor names are the released ones. Shapes: B clips, C channels, F mel frames, M mel bins. The two levels are
the mel's own rate and half of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.config.decoder import NORM_GROUPS, FlowConfig
from stepaudio_train.models.decoder.masking import MaskedGroupNorm, zeroed

_TIME_SCALE = 1000.0


def time_features(time: Tensor, size: int) -> Tensor:
    """Times [B] within 0..1 -> [B, size] sines, then cosines, of rates from 1000 to 0.1 in geometric steps."""
    half = size // 2
    rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000.0) / (half - 1)))
    angles = _TIME_SCALE * time[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Features of a time through two linear layers."""

    def __init__(self, size: int, out_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(size, out_size)
        self.linear_2 = nn.Linear(out_size, out_size)

    def forward(self, time: Tensor) -> Tensor:
        """[B] -> [B, out size]."""
        return self.linear_2(F.silu(self.linear_1(time_features(time, self.linear_1.in_features))))


class ConvBlock(nn.Module):
    """Convolution over three frames, group norm, Mish."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        convolution = nn.Conv1d(in_channels, channels, 3, padding=1)
        self.block = nn.ModuleList([convolution, MaskedGroupNorm(NORM_GROUPS, channels)])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, C, F], mask [B, F] -> [B, channels, F]."""
        convolution, norm = self.block
        return F.mish(norm(convolution(zeroed(x, mask)), mask))


class ResnetBlock(nn.Module):
    """Two convolution blocks with the time added between them, beside a projection of what came in."""

    def __init__(self, in_channels: int, channels: int, time_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_size, channels))
        self.block1 = ConvBlock(in_channels, channels)
        self.block2 = ConvBlock(channels, channels)
        self.res_conv = nn.Conv1d(in_channels, channels, 1)

    def forward(self, x: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, C, F], time [B, time size], mask [B, F] -> [B, channels, F]."""
        hidden = self.block1(x, mask) + self.mlp(time)[:, :, None]
        return self.block2(hidden, mask) + self.res_conv(x)


class Attention(nn.Module):
    """Self-attention without positions: the convolutions tell neighbours."""

    def __init__(self, channels: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, num_heads * head_size, bias=False)
        self.to_k = nn.Linear(channels, num_heads * head_size, bias=False)
        self.to_v = nn.Linear(channels, num_heads * head_size, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(num_heads * head_size, channels)])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, F, C], mask [B, F] bool of the keys (None: all count) -> [B, F, C]."""
        projected = (self.to_q(x), self.to_k(x), self.to_v(x))
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in projected]
        context = F.scaled_dot_product_attention(*heads, attn_mask=None if mask is None else mask[:, None, None])
        return self.to_out[0](context.transpose(1, 2).flatten(2))


class GeluLinear(nn.Module):
    """Linear layer and GELU."""

    def __init__(self, in_size: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_size, size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Four times as wide within. The released list has a dropout of rate 0 at place 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GeluLinear(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """One pre-norm Transformer block."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        channels = config.decoder_channels
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, config.decoder_heads, config.decoder_head_size)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """As `Attention.forward`."""
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class Resample(nn.Module):
    """A convolution that halves or doubles the frames; `conv` is the released name."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.conv = convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class VelocityUNet(nn.Module):
    """Where a noisy mel spectrum at a time moves to, given what is known of it."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        # Side by side: the noisy mel, the encoder's mel, the speaker, and the mel that is given.
        in_channels, channels = 4 * config.num_mel_bins, config.decoder_channels
        self.time_mlp = TimeEmbedding(in_channels, 4 * channels)

        def stage(num_channels: int, *resampling: nn.Module) -> nn.ModuleList:
            transformers = nn.ModuleList([TransformerBlock(config) for _ in range(config.decoder_transformers)])
            return nn.ModuleList([ResnetBlock(num_channels, channels, 4 * channels), transformers, *resampling])

        def same_rate() -> nn.Module:
            return nn.Conv1d(channels, channels, 3, padding=1)

        halving = Resample(nn.Conv1d(channels, channels, 3, stride=2, padding=1))
        doubling = Resample(nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1))
        self.down_blocks = nn.ModuleList([stage(in_channels, halving), stage(channels, same_rate())])
        self.mid_blocks = nn.ModuleList([stage(channels) for _ in range(config.decoder_mid_blocks)])
        self.up_blocks = nn.ModuleList([stage(2 * channels, doubling), stage(2 * channels, same_rate())])
        self.final_block = ConvBlock(channels, channels)
        self.final_proj = nn.Conv1d(channels, config.num_mel_bins, 1)
        self.apply(_initialise)

    def forward(self, x: Tensor, condition: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        """Velocity [B, M, F], zero behind each clip's end.

        Args:
            x: [B, M, F] noisy mel; condition: [B, 3 M, F]; time: [B], from 0 (noise) to 1 (mel).
            mask: [B, F] bool; None where all clips have F frames.
        """
        embedded = self.time_mlp(time)
        masks = [mask, None if mask is None else mask[:, ::2]]
        x, skipped = torch.cat([x, condition], dim=1), []
        for (resnet, transformers, resample), level_mask in zip(self.down_blocks, masks, strict=True):
            x = _run(resnet, transformers, x, embedded, level_mask)
            skipped.append(x)
            x = resample(zeroed(x, level_mask))
        for resnet, transformers in self.mid_blocks:
            x = _run(resnet, transformers, x, embedded, masks[-1])
        for (resnet, transformers, resample), level_mask in zip(self.up_blocks, reversed(masks), strict=True):
            skip = skipped.pop()
            # An odd number of frames comes back from half the rate with one too many.
            x = torch.cat([x[:, :, : skip.shape[2]], skip], dim=1)
            x = resample(zeroed(_run(resnet, transformers, x, embedded, level_mask), level_mask))
        return zeroed(self.final_proj(self.final_block(x, mask)), mask)


def _run(resnet: nn.Module, transformers: nn.ModuleList, x: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
    x = resnet(x, time, mask).transpose(1, 2)
    for block in transformers:
        x = block(x, mask)
    return x.transpose(1, 2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv1d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
