"""Typed, frozen configuration of the vocoder, its discriminators and its losses. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class MelConfig:
    """The speech decoder's log-mel spectrum, between the flow-matching model and the vocoder."""

    __pydantic_config__ = _STRICT

    sample_rate_hz: int = 22050
    window_samples: int = 1024
    """Of the Hann window and of the Fourier transform."""
    hop_samples: int = 256
    """From one frame to the next."""
    num_bins: int = 80
    lowest_hz: float = 0.0
    highest_hz: float | None = 8000.0
    """None: half the sample rate."""


@dataclass(frozen=True)
class VocoderConfig:
    """HiFT: a harmonic source, filtered by a convolutional network that ends in an inverse STFT.

    The default has 1.0 million weights; the released vocoder (TTS-3B `hift.pt`) 20.5 million.
    """

    __pydantic_config__ = _STRICT

    mel: MelConfig = field(default_factory=MelConfig)
    base_channels: int = 128
    """Channels at the mel's rate; half as many after each upsampling."""
    upsample_rates: tuple[int, ...] = (8, 8)
    """Their product times `stft_hop_samples` is the mel's hop."""
    upsample_kernels: tuple[int, ...] = (16, 16)
    resblock_kernels: tuple[int, ...] = (3, 7)
    """Residual blocks side by side, whose mean is taken."""
    source_kernels: tuple[int, ...] = (7, 11)
    """Of the source's residual block at each rate."""
    dilations: tuple[int, ...] = (1, 3, 5)
    """Of the convolutions of every residual block."""
    stft_samples: int = 16
    stft_hop_samples: int = 4
    f0_channels: int = 128
    """Width of the pitch predictor."""
    num_harmonics: int = 8
    """Sines above the fundamental."""
    sine_amplitude: float = 0.1
    """Of each voiced sine; a third of it is the noise's standard deviation where there is no voice."""
    noise_std: float = 0.003
    """Of the noise that is added to voiced sines."""
    voiced_threshold_hz: float = 10.0
    """A frame whose pitch is over this has a voice."""
    leaky_slope: float = 0.1
    audio_limit: float = 0.99
    """Samples are clipped to this magnitude."""

    @classmethod
    def released(cls) -> VocoderConfig:
        """Sizes of the released vocoder, TTS-3B `CosyVoice-300M-25Hz/hift.pt`."""
        return cls(base_channels=512, resblock_kernels=(3, 7, 11), f0_channels=512)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The multi-period and multi-resolution discriminators that the vocoder learns against."""

    __pydantic_config__ = _STRICT

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    """Samples; one discriminator each sees the waveform folded at this period."""
    period_channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    """Of the convolutions, each of stride 3, the last of stride 1."""
    resolutions: tuple[tuple[int, int, int], ...] = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
    """(Fourier transform, hop, window) in samples; one discriminator each sees that magnitude spectrogram."""
    spectrogram_channels: int = 8

    @classmethod
    def full_size(cls) -> DiscriminatorConfig:
        """Sizes of CosyVoice's training recipe; the released directory holds no discriminators."""
        return cls(period_channels=(32, 128, 512, 1024, 1024), spectrogram_channels=32)


@dataclass(frozen=True)
class VocoderLossConfig:
    """Weights of the vocoder's losses beside the least-squares adversarial loss, of weight 1. CosyVoice's recipe."""

    __pydantic_config__ = _STRICT

    mel: float = 45.0
    highest_hz: float | None = None
    """Up to where the mel loss hears. None: half the sample rate, wherever the decoder's mel ends. Above half the rate
    of recordings that were resampled there is nothing, and learning to make nothing takes most of the loss."""
    features: float = 2.0
    relativistic: float = 1.0
    relativistic_limit: float = 0.04
    """The relativistic loss of one discriminator stops here."""
    f0: float = 1.0
    """Per Hz. It reaches the pitch predictor alone."""


def vocoder_problems(config: VocoderConfig) -> list[str]:
    """What is wrong with the sizes of a vocoder, a line each."""
    problems = []
    stages = len(config.upsample_rates)
    for name, kernels in (("upsample_kernels", config.upsample_kernels), ("source_kernels", config.source_kernels)):
        if len(kernels) != stages:
            problems.append(f"{name}={list(kernels)}: must be as many as upsample_rates={list(config.upsample_rates)}")
    for rate, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=False):
        if kernel < rate or (kernel - rate) % 2:
            problems.append(f"upsample_kernels={kernel}: must be {rate}, the rate, or more by an even number")
    for name, kernels in (("resblock_kernels", config.resblock_kernels), ("source_kernels", config.source_kernels)):
        if not kernels or any(kernel % 2 == 0 for kernel in kernels):
            problems.append(f"{name}={list(kernels)}: must be odd, and at least one")
    hop = prod(config.upsample_rates) * config.stft_hop_samples
    if hop != config.mel.hop_samples:
        problems.append(
            f"mel.hop_samples={config.mel.hop_samples}: must be the product of upsample_rates and stft_hop_samples; "
            f"type mel.hop_samples={hop}"
        )
    if config.stft_samples % 2 or not 0 < 2 * config.stft_hop_samples <= config.stft_samples:
        problems.append(
            f"stft_samples={config.stft_samples}: must be even and at least twice stft_hop_samples="
            f"{config.stft_hop_samples}"
        )
    if config.base_channels % 2**stages:
        wanted = -(-config.base_channels // 2**stages) * 2**stages
        problems.append(f"base_channels={config.base_channels}: is halved {stages} times; type base_channels={wanted}")
    if config.num_harmonics < 0:
        problems.append(f"num_harmonics={config.num_harmonics}: must not be under 0; type num_harmonics=8")
    return problems
