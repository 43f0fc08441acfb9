"""Spectral features of batches of recordings, in plain torch: the same on CPU and GPU, and without randomness.

Padding never reaches a clip's features: every function takes the clips' own lengths.
Shapes: B clips, N samples, T frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE_HZ = 16000
FRAME_SHIFT = 160
"""Samples from one frame to the next: 10 ms, for both kinds of features."""
KALDI_FRAME = 400
WHISPER_FFT = 400
WHISPER_LOG_RANGE = 8.0

Features = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""([B, N] samples, [B] counts) -> ([B, T, M] log power, [B] frames)."""


def pad_clips(clips: Sequence[Tensor], value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Stack clips [n_i, ...] of any lengths into [B, max n, ...], with their lengths [B] int64 on the same device."""
    lengths = torch.tensor([len(clip) for clip in clips], device=clips[0].device)
    return torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True, padding_value=value), lengths


def batches_of_like_length(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of clips, shortest first, in batches of at most `limit` with padding, or of one clip."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """[B, size] bool: True where a clip has a value."""
    return torch.arange(size, device=lengths.device)[None] < lengths[:, None]


def num_kaldi_frames(num_samples: Tensor) -> Tensor:
    """Frames of `kaldi_fbank`: only those that lie wholly inside the clip."""
    return torch.where(num_samples < KALDI_FRAME, 0, 1 + (num_samples - KALDI_FRAME) // FRAME_SHIFT)


def kaldi_fbank(
    waveforms: Tensor,
    num_samples: Tensor,
    num_mel_bins: int = 80,
    window: Literal["hamming", "povey"] = "hamming",
    full_scale: float = 32768.0,
) -> tuple[Tensor, Tensor]:
    """Kaldi's log mel filter-bank energies: 25 ms windows every 10 ms, no dither.

    By default as Paraformer takes them. Speaker models take Kaldi's own "povey" window and samples as they are.

    Args:
        waveforms: [B, N] float32 at 16 kHz, within -1..1, zero-padded.
        num_samples: [B] int64.
        full_scale: what a sample of 1 counts as; the default is that of 16 bits.

    Returns:
        features [B, T, M] float32 in nats, zero past the end, and frames [B] int64.
    """
    num_frames = num_kaldi_frames(num_samples)
    if waveforms.shape[1] < KALDI_FRAME:
        waveforms = F.pad(waveforms, (0, KALDI_FRAME - waveforms.shape[1]))
    frames = (waveforms * full_scale).unfold(1, KALDI_FRAME, FRAME_SHIFT)
    frames = frames - frames.mean(dim=2, keepdim=True)
    frames = frames - 0.97 * F.pad(frames, (1, 0), mode="replicate")[:, :, :-1]
    power = torch.fft.rfft(frames * _kaldi_window(window).to(frames.device), n=512).abs().square()
    energies = power @ _kaldi_filters(num_mel_bins).to(power.device)
    features = energies.clamp(min=torch.finfo(torch.float32).eps).log()
    return features * length_mask(num_frames, features.shape[1])[:, :, None], num_frames


def stack_frames(features: Tensor, num_frames: Tensor, window: int, stride: int) -> tuple[Tensor, Tensor]:
    """Low frame rate (LFR): put `window` neighbouring frames side by side, every `stride` frames.

    The first frame is repeated (window - 1) // 2 times in front and the last as often as needed behind.

    Args:
        features: [B, T, M]; num_frames: [B] int64.

    Returns:
        stacked [B, ceil(T / stride), window * M], zero past the end, and their counts [B] = ceil(frames / stride).
    """
    counts = -(-num_frames // stride)
    starts = torch.arange(-(-features.shape[1] // stride), device=features.device) * stride - (window - 1) // 2
    index = starts[:, None] + torch.arange(window, device=features.device)
    index = torch.minimum(index.clamp(min=0)[None], (num_frames - 1).clamp(min=0)[:, None, None])
    batch = torch.arange(len(features), device=features.device)[:, None, None]
    stacked = features[batch, index].flatten(2)
    return stacked * length_mask(counts, stacked.shape[1])[:, :, None], counts


def log_mel(waveforms: Tensor, num_samples: Tensor, num_mel_bins: int = 128) -> tuple[Tensor, Tensor]:
    """Whisper's mel spectrum before its normalisation: 25 ms Hann window every 10 ms, Slaney mel, log10 of power.

    Args:
        waveforms: [B, N] float32 at 16 kHz; num_samples: [B] int64, each over 200 (the reflection at the edges).

    Returns:
        [B, T, M] float32 in log10 power, and frames [B] int64 = samples // 160. Meaningless past the end.
    """
    half = WHISPER_FFT // 2
    positions = torch.arange(-half, waveforms.shape[1] + half, device=waveforms.device)[None].abs()
    last = num_samples[:, None] - 1
    # Each clip is mirrored at its own end, as if it were alone in the batch.
    mirrored = torch.where(positions > last, 2 * last - positions, positions).clamp(min=0)
    frames = waveforms.gather(1, mirrored).unfold(1, WHISPER_FFT, FRAME_SHIFT)[:, :-1]
    window = torch.hann_window(WHISPER_FFT, device=frames.device)
    power = torch.fft.rfft(frames * window).abs().square()
    energies = power @ _whisper_filters(num_mel_bins).to(power.device)
    return energies.clamp(min=1e-10).log10(), num_samples // FRAME_SHIFT


def normalise_log_mel(features: Tensor, num_frames: Tensor) -> Tensor:
    """Whisper's normalisation of `log_mel`: at most 8 below the clip's maximum, then (x + 4) / 4; zero past the end."""
    mask = length_mask(num_frames, features.shape[1])[:, :, None]
    peak = features.masked_fill(~mask, -torch.inf).amax(dim=(1, 2), keepdim=True)
    return ((torch.maximum(features, peak - WHISPER_LOG_RANGE) + 4.0) / 4.0).masked_fill(~mask, 0.0)


def _kaldi_window(name: Literal["hamming", "povey"]) -> Tensor:
    """[400]"""
    if name == "povey":
        return torch.hann_window(KALDI_FRAME, periodic=False).pow(0.85)
    return torch.hamming_window(KALDI_FRAME, periodic=False)


@lru_cache
def _kaldi_filters(num_mel_bins: int) -> Tensor:
    """[257, M] triangles between 20 Hz and 8 kHz, straight on Kaldi's mel scale."""
    # Imported late: it costs two seconds, and reading audio does not need it.
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        257, num_mel_bins, 20.0, 8000.0, SAMPLE_RATE_HZ, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    return torch.from_numpy(filters).float()


@lru_cache
def _whisper_filters(num_mel_bins: int) -> Tensor:
    """[201, M] triangles of equal area on Slaney's mel scale, 0 Hz to 8 kHz."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(201, num_mel_bins, 0.0, 8000.0, SAMPLE_RATE_HZ, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()
