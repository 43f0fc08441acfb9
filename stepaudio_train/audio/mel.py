"""The speech decoder's log-mel spectrum: what the flow-matching model makes and the vocoder turns into sound.

Shapes: B clips of one length, N samples, T frames, M mel bins.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio_train.config.vocoder import MelConfig

_FLOOR = 1e-5
"""Smallest magnitude of a bin before the logarithm."""
_POWER_FLOOR = 1e-9
"""Keeps the gradient of the magnitude finite in silence."""


def decoder_log_mel(waveforms: Tensor, config: MelConfig) -> Tensor:
    """Natural logarithm of mel magnitudes, as HiFi-GAN and the released speech decoder take it (formats.md 5.1).

    Slaney's mel scale with triangles of equal area. The ends are mirrored by (window - hop) / 2 samples and frames are
    not centred on multiples of the hop, so that N samples give N // hop frames, frame t around sample (t + 0.5) * hop:
    the frames of `stepaudio_train.audio.pitch.yin` with this hop. Differentiable.

    Args:
        waveforms: [B, N] float32 at `config.sample_rate_hz`, within -1..1; N over (window - hop) / 2.

    Returns:
        [B, M, T] float32 in nats.
    """
    mirrored = (config.window_samples - config.hop_samples) // 2
    padded = F.pad(waveforms, (mirrored, mirrored), mode="reflect")
    frames = padded.unfold(-1, config.window_samples, config.hop_samples)
    window = torch.hann_window(config.window_samples, device=frames.device)
    spectrum = torch.view_as_real(torch.fft.rfft(frames * window))
    magnitudes = (spectrum.square().sum(-1) + _POWER_FLOOR).sqrt()
    mel = magnitudes @ _filters(config).to(magnitudes.device)
    return mel.clamp(min=_FLOOR).log().transpose(1, 2)


@lru_cache
def _filters(config: MelConfig) -> Tensor:
    """[window // 2 + 1, M] float32."""
    # Imported late: it costs two seconds, and reading audio does not need it.
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        config.window_samples // 2 + 1,
        config.num_bins,
        config.lowest_hz,
        config.sample_rate_hz / 2 if config.highest_hz is None else config.highest_hz,
        config.sample_rate_hz,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()
