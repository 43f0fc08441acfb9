"""What the flow is trained for: the velocity on the straight path from noise to mel (conditional flow matching).

The released program's objective: its settings name an L1 loss, and its code takes squares, as here.

Shapes: B clips, T tokens, F mel frames, M mel bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepaudio_train.audio.features import length_mask
from stepaudio_train.models.decoder.flow import FlowInputs, FlowMatching, cosine_times

SIGMA_MIN = 1e-6
"""Standard deviation that is left of the noise where the path ends."""
PROMPT_PROBABILITY = 0.5
LONGEST_PROMPT_SHARE = 0.3
CONDITION_DROPOUT = 0.2
"""Share of the clips that nothing is told about, which classifier-free guidance needs."""


@dataclass(frozen=True)
class FlowBatch:
    """Clips with their mel spectra."""

    tokens: Tensor
    """[B, T] int64; any of the vocabulary's ids behind the end."""
    num_tokens: Tensor
    """[B] int64."""
    mel: Tensor
    """[B, F, M] float32; anything behind the end."""
    num_frames: Tensor
    """[B] int64."""
    speaker: Tensor
    """[B, speaker size] float32."""


@dataclass(frozen=True)
class FlowDraws:
    """All that chance decides about a batch."""

    time: Tensor
    """[B] float32 within 0..1."""
    noise: Tensor
    """[B, F, M] float32; anything behind the end."""
    num_prompt_frames: Tensor
    """[B] int64: first frames that are given, as a prompt's are."""
    told: Tensor
    """[B] bool: whether the condition is given at all."""

    @classmethod
    def draw(cls, batch: FlowBatch, generator: torch.Generator) -> FlowDraws:
        """From a generator on the CPU, so that every device gets the same; then on the batch's device."""
        frames, device = batch.num_frames.cpu(), batch.mel.device
        time, has_prompt, share, told = torch.rand(4, len(frames), generator=generator)
        longest = (LONGEST_PROMPT_SHARE * frames).long()
        prompt = (share * (longest + 1)).long() * (has_prompt < PROMPT_PROBABILITY)
        noise = torch.randn(batch.mel.shape, generator=generator)
        draws = (cosine_times(time), noise, prompt, told >= CONDITION_DROPOUT)
        return cls(*(values.to(device) for values in draws))


class FlowLoss(NamedTuple):
    """Sums over a batch. The step's loss is the sum over all batches and processes, divided once."""

    velocity_sum: Tensor
    """Scalar float32, differentiable: squared error of the velocity, mean over mel bins, sum over frames; 0 where the
    encoder learns alone."""
    encoder_sum: Tensor
    """The same of the encoder's mel."""
    num_frames: Tensor
    """Scalar int64: what they are divided by."""


def flow_loss(model: FlowMatching, batch: FlowBatch, draws: FlowDraws) -> FlowLoss:
    """Optimal-transport conditional flow matching (Lipman et al. 2023, equations 22 and 23).

    The noisy mel at time t is (1 - (1 - sigma) t) noise + t mel, its velocity mel - (1 - sigma) noise; no time is
    before `FlowConfig.start_time`. Given frames count like all others. Padding changes nothing.
    """
    inside = length_mask(batch.num_frames, batch.mel.shape[1])[:, :, None]
    mel = batch.mel.masked_fill(~inside, 0.0)
    given = mel * length_mask(draws.num_prompt_frames, mel.shape[1])[:, :, None]
    inputs = FlowInputs(batch.tokens, batch.num_tokens[:, None], batch.num_frames[:, None], batch.speaker, given)
    condition, mask = model.condition(inputs)
    start = model.config.start_time
    times = start + (1 - start) * draws.time
    time = times[:, None, None]
    noisy = (1 - (1 - SIGMA_MIN) * time) * draws.noise + time * mel
    velocity = model.velocity(noisy.transpose(1, 2), condition * draws.told[:, None, None], times, mask)
    error = velocity.transpose(1, 2) - (mel - (1 - SIGMA_MIN) * draws.noise)
    encoded = condition[:, : mel.shape[2]].transpose(1, 2)
    return FlowLoss(_squares(error, inside), _squares(encoded - mel, inside), batch.num_frames.sum())


def encoder_loss(model: FlowMatching, batch: FlowBatch) -> FlowLoss:
    """The loss of the encoder's mel alone, at a small part of the work: what the network is told can be learned before
    the network (Grad-TTS, arXiv 2105.06337, has it as its encoder loss)."""
    inside = length_mask(batch.num_frames, batch.mel.shape[1])[:, :, None]
    mel = batch.mel.masked_fill(~inside, 0.0)
    inputs = FlowInputs(batch.tokens, batch.num_tokens[:, None], batch.num_frames[:, None], batch.speaker, mel)
    encoded = model.encoded_mel(inputs)[0].transpose(1, 2)
    return FlowLoss(encoded.new_zeros(()), _squares(encoded - mel, inside), batch.num_frames.sum())


def _squares(error: Tensor, inside: Tensor) -> Tensor:
    """Mean over mel bins of [B, F, M] squares, summed over the frames of [B, F, 1] that are inside."""
    return (error.square() * inside).mean(dim=2).sum()
