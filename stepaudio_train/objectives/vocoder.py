"""Losses of the vocoder and of its discriminators (CosyVoice's recipe: HiFi-GAN's losses, a relativistic one, pitch).

All are means over segments of one length, so that the mean over ranks with as many segments each is the global mean.
Not so the relativistic loss: its median is a batch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio_train.audio.mel import decoder_log_mel
from stepaudio_train.config.vocoder import MelConfig, VocoderLossConfig


@dataclass(frozen=True)
class JudgedSpeech:
    """Segments of speech, recorded or generated, and what the discriminators say of them."""

    waveforms: Tensor
    """[B, N] float32."""
    f0_hz: Tensor
    """[B, T], 0 where there is no voice. Recorded: measured; generated: predicted from the mel."""
    scores: Sequence[Tensor] = ()
    """A discriminator each: [B, any]; none before there are discriminators."""
    features: Sequence[Sequence[Tensor]] = ()
    """A discriminator each, a layer each: any shape."""


def generator_losses(
    recorded: JudgedSpeech, generated: JudgedSpeech, mel: MelConfig, weights: VocoderLossConfig
) -> dict[str, Tensor]:
    """The vocoder's losses by name, scalars; `loss` is their weighted sum, the others are not weighted.

    Without scores, `mel` and `f0` alone.
    """
    spectral = mel_loss(recorded.waveforms, generated.waveforms, mel, weights.highest_hz)
    f0 = F.l1_loss(generated.f0_hz, recorded.f0_hz)
    loss = weights.mel * spectral + weights.f0 * f0
    if not generated.scores:
        return {"loss": loss, "mel": spectral, "f0": f0}
    adversarial = deceiving_loss(generated.scores)
    features = feature_matching_loss(recorded.features, generated.features)
    relativistic = relativistic_loss(generated.scores, recorded.scores, weights.relativistic_limit)
    loss = loss + adversarial + weights.features * features + weights.relativistic * relativistic
    judged = {"adversarial": adversarial, "features": features, "relativistic": relativistic}
    return {"loss": loss, "mel": spectral, "f0": f0, **judged}


def discriminator_losses(
    recorded: Sequence[Tensor], generated: Sequence[Tensor], weights: VocoderLossConfig
) -> dict[str, Tensor]:
    """The discriminators' losses by name, scalars, of their scores; `loss` is the weighted sum.

    The generated waveforms are to be detached.
    """
    adversarial = telling_apart_loss(recorded, generated)
    relativistic = relativistic_loss(recorded, generated, weights.relativistic_limit)
    loss = adversarial + weights.relativistic * relativistic
    return {"loss": loss, "adversarial": adversarial, "relativistic": relativistic}


def mel_loss(recorded: Tensor, generated: Tensor, mel: MelConfig, highest_hz: float | None = None) -> Tensor:
    """Mean absolute difference of the log-mel, in nats.

    Args:
        recorded, generated: [B, N].
        highest_hz: see `VocoderLossConfig`.
    """
    heard = replace(mel, highest_hz=highest_hz)
    return F.l1_loss(decoder_log_mel(generated, heard), decoder_log_mel(recorded, heard))


def feature_matching_loss(recorded: Sequence[Sequence[Tensor]], generated: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean absolute difference of every layer's features, summed over layers and discriminators, times HiFi-GAN's 2."""
    pairs = [
        F.l1_loss(made, wanted)
        for wanted_layers, made_layers in zip(recorded, generated, strict=True)
        for wanted, made in zip(wanted_layers, made_layers, strict=True)
    ]
    return 2 * torch.stack(pairs).sum()


def deceiving_loss(generated: Sequence[Tensor]) -> Tensor:
    """Least squares (LS-GAN): how far generated speech is from being taken for recorded; summed over discriminators."""
    return torch.stack([(1 - scores).square().mean() for scores in generated]).sum()


def telling_apart_loss(recorded: Sequence[Tensor], generated: Sequence[Tensor]) -> Tensor:
    """Least squares: recorded speech should score 1 and generated 0; summed over discriminators."""
    return deceiving_loss(recorded) + torch.stack([scores.square().mean() for scores in generated]).sum()


def relativistic_loss(preferred: Sequence[Tensor], other: Sequence[Tensor], limit: float) -> Tensor:
    """Truncated pointwise relativistic least squares (Li and Wang 2022; CosyVoice's `tpr_loss`).

    `preferred` is what the learner wants to score higher: recorded speech for the discriminators, generated for the
    vocoder. Of the differences preferred - other, those under their median count with the squared distance from it; 0
    where there is none. The mean of one discriminator is cut at `limit`, then summed over discriminators.
    """
    losses = []
    for higher, lower in zip(preferred, other, strict=True):
        distance = higher - lower
        distance = distance - distance.median()
        under = distance < 0
        losses.append((distance.square() * under).sum() / under.sum().clamp(min=1))
    return torch.stack(losses).clamp(max=limit).sum()
