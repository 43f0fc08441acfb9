"""HiFT, the speech decoder's vocoder: mel frames to samples (paper 3.3; HiFTNet, arXiv 2309.09493).

A pitch predictor drives sines at the pitch and its harmonics, and noise where there is no voice. A convolutional
network upsamples the mel, takes in the source's short-time spectrum at every rate, and gives the spectrum of the sound,
which an inverse STFT turns into samples.

Module and tensor names are those of the released TTS-3B `hift.pt`. Shapes: B clips, M mel bins, T mel frames,
N = T * hop samples, C channels, S = N / STFT hop + 1 frames of the short-time spectrum.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from stepaudio_train.config.vocoder import VocoderConfig

_EDGE_KERNEL = 7
"""Taps of the first and the last convolution."""
_F0_LAYERS = 5
_F0_KERNEL = 3
_LARGEST_MAGNITUDE = 100.0
_WEIGHT_NORM_NAMES = {
    ".parametrizations.weight.original0": ".weight_g",
    ".parametrizations.weight.original1": ".weight_v",
}


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha with an alpha per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, any] -> the same shape."""
        alpha = self.alpha[:, None]
        return x + (alpha * x).sin().square() / (alpha + 1e-9)


class ResBlock(nn.Module):
    """Pairs of convolutions, the first of each dilated, around a residual sum."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList([_same_length(channels, channels, kernel, dilation) for dilation in dilations])
        self.convs2 = nn.ModuleList([_same_length(channels, channels, kernel) for _ in dilations])
        self.activations1 = nn.ModuleList([Snake(channels) for _ in dilations])
        self.activations2 = nn.ModuleList([Snake(channels) for _ in dilations])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, any] -> the same shape."""
        for first, conv1, second, conv2 in zip(
            self.activations1, self.convs1, self.activations2, self.convs2, strict=True
        ):
            x = x + conv2(second(conv1(first(x))))
        return x


class F0Predictor(nn.Module):
    """Pitch from the mel alone (the released ConvRNNF0Predictor; there is no recurrence in it)."""

    context_frames = _F0_LAYERS * (_F0_KERNEL // 2)
    """Mel frames on each side that a frame's pitch depends on."""

    def __init__(self, num_bins: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(_F0_LAYERS):
            layers += [_same_length(channels if index else num_bins, channels, _F0_KERNEL), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, M, T] -> [B, T] Hz, not negative."""
        return self.classifier(self.condnet(mel).transpose(1, 2)).squeeze(-1).abs()


class SourceState(NamedTuple):
    """Where the source's sines are. With it, the source of a clip's next frames goes on without a break."""

    cycles: Tensor
    """[B] float64: the fundamental's phase, in periods, behind the last sample."""
    offsets: Tensor
    """[B, harmonics + 1] radians that are added to each sine's phase: random, none for the fundamental."""


class HarmonicSource(nn.Module):
    """Sines at the pitch and its harmonics with noise, mixed into one signal (neural source filter)."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.l_linear = nn.Linear(config.num_harmonics + 1, 1)

    def begin(self, batch_size: int, generator: torch.Generator) -> SourceState:
        """The state before the first sample."""
        device = self.l_linear.weight.device
        shape = (batch_size, self.config.num_harmonics + 1)
        offsets = (2 * torch.rand(shape, generator=generator, device=device) - 1) * math.pi
        offsets[:, 0] = 0
        return SourceState(torch.zeros(batch_size, dtype=torch.float64, device=device), offsets)

    def forward(self, f0_hz: Tensor, state: SourceState, generator: torch.Generator) -> tuple[Tensor, SourceState]:
        """Pitch [B, T] -> source [B, N], and the state behind it. No gradient reaches the pitch."""
        with torch.no_grad():
            sines, state = self.sines(f0_hz, state, generator)
        return self.l_linear(sines).squeeze(-1).tanh(), state

    def sines(self, f0_hz: Tensor, state: SourceState, generator: torch.Generator) -> tuple[Tensor, SourceState]:
        """Pitch [B, T] -> [B, N, harmonics + 1] sines with noise, and the state behind them."""
        config, hop, device = self.config, self.config.mel.hop_samples, f0_hz.device
        # float64: after a minute of speech, float32 would have lost the phase of the highest harmonic.
        step = f0_hz.double() / config.mel.sample_rate_hz
        ends = state.cycles[:, None] + hop * step.cumsum(dim=1)
        within = torch.arange(1 - hop, 1, device=device)
        cycles = (ends[:, :, None] + step[:, :, None] * within).flatten(1)
        harmonics = torch.arange(1, config.num_harmonics + 2, device=device)
        phases = 2 * math.pi * (cycles[:, :, None] * harmonics % 1).float() + state.offsets[:, None]
        # Drawn frame by frame, so that a stream draws the same numbers as the whole clip.
        shape = (len(f0_hz), hop, config.num_harmonics + 1)
        drawn = [torch.randn(shape, generator=generator, device=device) for _ in range(f0_hz.shape[1])]
        voiced = (f0_hz > config.voiced_threshold_hz).repeat_interleave(hop, dim=1)[:, :, None]
        noise = torch.cat(drawn, dim=1) * torch.where(voiced, config.noise_std, config.sine_amplitude / 3)
        return config.sine_amplitude * phases.sin() * voiced + noise, SourceState(ends[:, -1] % 1, state.offsets)


class Synthesis(NamedTuple):
    """What the vocoder makes of mel frames."""

    waveform: Tensor
    """[B, N] float32 within +-audio_limit."""
    f0_hz: Tensor
    """[B, T] predicted pitch; the only road of a gradient to the pitch predictor."""


class HiFTGenerator(nn.Module):
    """The vocoder.

    Its state dict has the released names: weight norm's direction and length are `weight_v` and `weight_g`, in what is
    saved and what is loaded.
    """

    stft_window: Tensor

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        bins = config.stft_samples + 2  # real and imaginary parts
        channels = [config.base_channels >> stage for stage in range(len(config.upsample_rates) + 1)]
        self.m_source = HarmonicSource(config)
        self.conv_pre = _same_length(config.mel.num_bins, channels[0], _EDGE_KERNEL)
        self.ups, self.source_downs, self.source_resblocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for stage, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernels, strict=True)):
            before, after = channels[stage : stage + 2]
            up = nn.ConvTranspose1d(before, after, kernel, stride=rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            self.source_downs.append(_source_down(bins, after, math.prod(config.upsample_rates[stage + 1 :])))
            self.source_resblocks.append(ResBlock(after, config.source_kernels[stage], config.dilations))
            self.resblocks += [ResBlock(after, size, config.dilations) for size in config.resblock_kernels]
        self.conv_post = _same_length(channels[-1], bins, _EDGE_KERNEL)
        self.f0_predictor = F0Predictor(config.mel.num_bins, config.f0_channels)
        self.register_buffer("stft_window", torch.hann_window(config.stft_samples), persistent=False)
        self.register_state_dict_post_hook(_save_released_names)

    def forward(self, mel: Tensor, generator: torch.Generator) -> Synthesis:
        """Turn mel frames into sound.

        Args:
            mel: [B, M, T] of `decoder_log_mel`, all of one length.
            generator: of noise and phases, on the mel's device. The same seed gives the same sound.
        """
        f0_hz = self.f0_predictor(mel)
        source, _ = self.m_source(f0_hz, self.m_source.begin(len(mel), generator), generator)
        return Synthesis(self.decode(mel, source), f0_hz)

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """Mel [B, M, T] and source [B, N] -> samples [B, N]."""
        spectrum = self._stft(source)
        x = self.conv_pre(mel)
        side_by_side = len(self.config.resblock_kernels)
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.config.leaky_slope))
            if stage == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")  # the short-time spectrum has one frame more
            x = x + self.source_resblocks[stage](self.source_downs[stage](spectrum))
            blocks = self.resblocks[stage * side_by_side : (stage + 1) * side_by_side]
            x = torch.stack([block(x) for block in blocks]).mean(dim=0)
        x = self.conv_post(F.leaky_relu(x))  # torch's slope, not `leaky_slope`: as released
        return self._istft(*x.chunk(2, dim=1)).clamp(-self.config.audio_limit, self.config.audio_limit)

    def context_frames(self) -> int:
        """Mel frames on each side of a frame beyond which `decode` of it depends on nothing.

        From the last layer to the first, in frames of the layer at hand.
        """
        config = self.config
        stft = math.ceil(config.stft_samples / 2 / config.stft_hop_samples)
        block = max(_block_reach(kernel, config.dilations) for kernel in config.resblock_kernels)
        edge = _EDGE_KERNEL // 2
        reach, stride, of_source = stft + edge + 1, 1, 0
        stages = zip(config.upsample_rates, config.upsample_kernels, config.source_kernels, strict=True)
        for rate, kernel, source_kernel in reversed(list(stages)):
            reach += block
            behind_down = reach + _block_reach(source_kernel, config.dilations) + 2
            of_source = max(of_source, behind_down * stride + stft)
            reach = math.ceil((reach + kernel) / rate)
            stride *= rate
        return max(reach + edge, math.ceil(of_source / stride))

    def _stft(self, source: Tensor) -> Tensor:
        """[B, N] -> [B, real parts and imaginary parts, S]."""
        size, hop = self.config.stft_samples, self.config.stft_hop_samples
        spectrum = torch.stft(source, size, hop, window=self.stft_window, return_complex=True)
        return torch.cat([spectrum.real, spectrum.imag], dim=1)

    def _istft(self, log_magnitude: Tensor, phase: Tensor) -> Tensor:
        """Twice [B, stft_samples // 2 + 1, S] -> [B, N]. The sine of `phase` is the phase in radians, as released."""
        size, hop = self.config.stft_samples, self.config.stft_hop_samples
        spectrum = torch.polar(log_magnitude.exp().clamp(max=_LARGEST_MAGNITUDE), phase.sin())
        return torch.istft(spectrum, size, hop, window=self.stft_window)


def _same_length(before: int, after: int, kernel: int, dilation: int = 1) -> nn.Module:
    """A weight-normed convolution that keeps the length; `kernel` is odd."""
    return weight_norm(nn.Conv1d(before, after, kernel, dilation=dilation, padding=dilation * (kernel // 2)))


def _source_down(bins: int, channels: int, stride: int) -> nn.Module:
    """Brings the source's spectrum to the rate of a stage."""
    if stride == 1:
        return nn.Conv1d(bins, channels, 1)
    return nn.Conv1d(bins, channels, 2 * stride, stride=stride, padding=stride // 2)


def _block_reach(kernel: int, dilations: tuple[int, ...]) -> int:
    """Frames on each side that a residual block sees."""
    return sum(kernel // 2 * (dilation + 1) for dilation in dilations)


def _save_released_names(module: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Rename weight norm's tensors in a state dict; on loading torch knows both names."""
    for name in [name for name in state if name.startswith(prefix)]:
        tensor = state.pop(name)  # every name in turn, so that the order stays
        for ours, released in _WEIGHT_NORM_NAMES.items():
            name = name.replace(ours, released)
        state[name] = tensor
