"""The decoder's log-mel against the plain formula in float64, frame by frame."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stepaudio_train.audio.mel import decoder_log_mel
from stepaudio_train.audio.pitch import yin
from stepaudio_train.config.vocoder import MelConfig

RELEASED = MelConfig()
EDITX = MelConfig(sample_rate_hz=24000, window_samples=1920, hop_samples=480)


def noise(num_samples: int) -> torch.Tensor:
    return 0.2 * torch.randn(num_samples, generator=torch.Generator().manual_seed(0))


def slaney_mel(hz):
    """Auditory Toolbox: linear to 1 kHz, 15 mel; then a factor of 6.4 every 27 mel."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1e-9) / 1000) / np.log(6.4))


def slaney_hz(mel):
    mel = np.asarray(mel, dtype=np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def plain_log_mel(waveform: np.ndarray, config: MelConfig) -> np.ndarray:
    """[M, T] float64."""
    size, hop = config.window_samples, config.hop_samples
    highest = config.highest_hz or config.sample_rate_hz / 2
    edges = slaney_hz(np.linspace(slaney_mel(config.lowest_hz), slaney_mel(highest), config.num_bins + 2))
    bins = np.arange(size // 2 + 1) * config.sample_rate_hz / size
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    mirrored = np.pad(waveform.astype(np.float64), (size - hop) // 2, mode="reflect")
    columns = []
    for start in range(0, len(mirrored) - size + 1, hop):
        magnitude = np.sqrt(np.abs(np.fft.rfft(mirrored[start : start + size] * window)) ** 2 + 1e-9)
        column = []
        for left, centre, right in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
            triangle = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clip(min=0)
            column.append(np.log(max((triangle * magnitude).sum() * 2 / (right - left), 1e-5)))
        columns.append(column)
    return np.array(columns).T


@pytest.mark.parametrize("config", [RELEASED, replace(RELEASED, highest_hz=None), EDITX], ids=["8k", "open", "editx"])
def test_it_is_the_plain_formula(config):
    clip = noise(5000)
    np.testing.assert_allclose(decoder_log_mel(clip[None], config)[0], plain_log_mel(clip.numpy(), config), atol=1e-4)


def test_clips_of_a_batch_are_apart():
    clips = noise(3 * 4096).view(3, 4096)
    together = decoder_log_mel(clips, RELEASED)
    assert together.shape == (3, 80, 16)
    for row, clip in zip(together, clips, strict=True):
        torch.testing.assert_close(row, decoder_log_mel(clip[None], RELEASED)[0])


@pytest.mark.parametrize("num_samples", [512, 767, 768, 22050])
def test_one_frame_a_hop_beside_the_pitch(num_samples):
    clip = noise(num_samples)
    frames = decoder_log_mel(clip[None], RELEASED).shape[2]
    assert frames == num_samples // 256
    assert len(yin(clip, 22050, hop_s=256 / 22050).f0_hz) == frames


def test_frames_are_centred_between_hops():
    clip = torch.zeros(1, 256 * 20)
    clip[0, 256 * 10 + 128] = 1.0
    loudest = decoder_log_mel(clip, RELEASED).mean(dim=1)[0]
    assert loudest.argmax() == 10
    torch.testing.assert_close(loudest[9], loudest[11], atol=0.02, rtol=0)


def test_silence_is_the_floor_and_has_a_gradient():
    clip = torch.zeros(1, 4096, requires_grad=True)
    mel = decoder_log_mel(clip, RELEASED)
    assert mel.max() < -5
    mel.sum().backward()
    assert clip.grad.isfinite().all()
