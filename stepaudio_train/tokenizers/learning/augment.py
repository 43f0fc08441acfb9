"""Augmentation of log-power features, a batch at a time: B clips, T frames of 10 ms, M mel bins, nats.

Working on features instead of samples lets them be computed once: a stretched time axis is another speed, a stretched
mel axis another vocal tract, a sum of powers is added noise, a smooth gain another microphone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio_train.audio.features import length_mask
from stepaudio_train.config.tokenizer import AugmentConfig


def warp(
    features: Tensor, num_frames: Tensor, config: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Change speed and vocal tract: [B, T, M] and [B] -> the same with each clip's own new length."""
    batch, _, bins = features.shape
    speed = 1 + config.speed * _uniform(batch, generator)
    stretch = 1 + config.vocal_tract * _uniform(batch, generator)
    lengths = (num_frames / speed).round().long().clamp(min=1)
    frames = int(lengths.max())
    # Where in the original each new point is read, in grid_sample's -1..1 over frame and bin centres.
    time = torch.arange(frames)[None] * speed[:, None]
    time = torch.minimum(time, (num_frames - 1)[:, None])
    mel = (torch.arange(bins)[None] * stretch[:, None]).clamp(max=bins - 1)
    grid = torch.stack(
        [
            (mel / (bins - 1) * 2 - 1)[:, None].expand(batch, frames, bins),
            (time / max(1, features.shape[1] - 1) * 2 - 1)[:, :, None].expand(batch, frames, bins),
        ],
        dim=-1,
    )
    warped = F.grid_sample(features[:, None], grid, padding_mode="border", align_corners=True)[:, 0]
    return warped, lengths


def corrupt(features: Tensor, num_frames: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Another microphone, added noise, and masks in time and frequency (SpecAugment); same shape."""
    batch, frames, bins = features.shape
    angles = math.pi * torch.arange(1, 4)[:, None] * (torch.arange(bins) + 0.5) / bins
    gains = torch.randn(batch, 3, generator=generator) @ angles.cos() * config.equaliser_nats
    features = features + gains[:, None]
    features = _add_noise(features, num_frames, config, generator)
    mask = length_mask(num_frames, frames)[:, :, None]
    mean = (features * mask).sum(dim=(1, 2)) / (mask.sum(dim=(1, 2)) * bins)
    hidden = torch.zeros(batch, frames, bins, dtype=torch.bool)
    for _ in range(config.time_masks):
        longest = torch.minimum(num_frames // 5, torch.tensor(config.time_mask_frames))
        hidden |= _stripe(frames, num_frames, longest, generator)[:, :, None]
    ends, widest = torch.full((batch,), bins), torch.full((batch,), config.mel_mask_bins)
    for _ in range(config.mel_masks):
        hidden |= _stripe(bins, ends, widest, generator)[:, None]
    return torch.where(hidden, mean[:, None, None], features)


def _add_noise(features: Tensor, num_frames: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    batch, frames, bins = features.shape
    inside = length_mask(num_frames, frames)[:, :, None]
    peak = features.masked_fill(~inside, -torch.inf).amax(dim=(1, 2))
    low, high = config.noise_floor_nats
    level = peak - (low + (high - low) * torch.rand(batch, generator=generator))
    tilt = torch.linspace(-1, 1, bins)[None] * 2 * _uniform(batch, generator)[:, None]
    # Band energies of noise scatter around their mean; half a nat is what a mel bin of white noise shows.
    noise = level[:, None, None] + tilt[:, None] + 0.5 * torch.randn(batch, frames, bins, generator=generator)
    noisy = torch.logaddexp(features, noise)
    chosen = torch.rand(batch, generator=generator) < config.noise_probability
    return torch.where(chosen[:, None, None], noisy, features)


def _stripe(size: int, ends: Tensor, longest: Tensor, generator: torch.Generator) -> Tensor:
    """[B, size] bool: one run of up to `longest` places somewhere before `ends`."""
    width = (torch.rand(len(ends), generator=generator) * (longest + 1)).long()
    start = (torch.rand(len(ends), generator=generator) * (ends - width + 1)).long()
    places = torch.arange(size)[None]
    return (places >= start[:, None]) & (places < (start + width)[:, None])


def _uniform(size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator) * 2 - 1
