"""What the vocoder learns against: multi-period and multi-resolution discriminators.

HiFi-GAN (arXiv 2010.05646, section 2.3) and UnivNet (arXiv 2106.07889, section 2.2), as CosyVoice's recipe takes them.
Shapes: B clips, N samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from stepaudio_train.config.vocoder import DiscriminatorConfig

_LEAKY_SLOPE = 0.1


class Judgement(NamedTuple):
    """What discriminators say of waveforms, an entry each."""

    scores: list[Tensor]
    """[B, any]: 1 for recorded speech, 0 for generated."""
    features: list[list[Tensor]]
    """[B, channels, height, width] of every layer, the scores' own included."""


class PeriodDiscriminator(nn.Module):
    """Sees a waveform folded at a period: each column holds every `period`-th sample."""

    def __init__(self, period: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.period = period
        sizes = zip((1, *channels), channels, [*[3] * (len(channels) - 1), 1], strict=False)
        self.convs = nn.ModuleList(
            [
                weight_norm(nn.Conv2d(before, after, (5, 1), (stride, 1), padding=(2, 0)))
                for before, after, stride in sizes
            ]
        )
        self.out = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveforms: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, N] -> scores [B, any], features; N at least the period."""
        padded = F.pad(waveforms, (0, -waveforms.shape[1] % self.period), mode="reflect")
        return _judge(padded.unflatten(1, (-1, self.period))[:, None], self.convs, self.out)


class SpectrogramDiscriminator(nn.Module):
    """Sees the magnitudes of a short-time spectrum."""

    window: Tensor

    def __init__(self, resolution: tuple[int, int, int], channels: int) -> None:
        """`resolution` as in `DiscriminatorConfig.resolutions`."""
        super().__init__()
        self.transform_samples, self.hop_samples, window_samples = resolution
        layers = [nn.Conv2d(1, channels, (3, 9), padding=(1, 4))]
        layers += [nn.Conv2d(channels, channels, (3, 9), (1, 2), padding=(1, 4)) for _ in range(3)]
        layers += [nn.Conv2d(channels, channels, 3, padding=1)]
        self.convs = nn.ModuleList([weight_norm(layer) for layer in layers])
        self.out = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)

    def forward(self, waveforms: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, N] -> scores [B, any], features; N over half the Fourier transform."""
        spectrum = torch.stft(
            waveforms,
            self.transform_samples,
            self.hop_samples,
            win_length=len(self.window),
            window=self.window,
            return_complex=True,
        )
        return _judge(spectrum.abs().transpose(1, 2)[:, None], self.convs, self.out)


class VocoderDiscriminators(nn.Module):
    """All of them together."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.mpd = nn.ModuleList([PeriodDiscriminator(period, config.period_channels) for period in config.periods])
        self.mrd = nn.ModuleList(
            [SpectrogramDiscriminator(resolution, config.spectrogram_channels) for resolution in config.resolutions]
        )

    def forward(self, waveforms: Tensor) -> Judgement:
        """[B, N] samples of one rate and length -> scores and features, the periods' first."""
        judged = [discriminator(waveforms) for discriminator in [*self.mpd, *self.mrd]]
        return Judgement([scores for scores, _ in judged], [features for _, features in judged])


def _judge(x: Tensor, convs: nn.ModuleList, out: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """[B, 1, height, width] through the layers -> scores [B, any], features."""
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), _LEAKY_SLOPE)
        features.append(x)
    x = out(x)
    return x.flatten(1), [*features, x]
