"""Features against plain formulas in float64, against Whisper's own extractor, and against themselves when padded."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from stepaudio_train.audio.features import (
    kaldi_fbank,
    log_mel,
    normalise_log_mel,
    num_kaldi_frames,
    pad_clips,
    stack_frames,
)


def noises(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(length, generator=generator) for length in lengths]


def plain_fbank(waveform: np.ndarray, num_bins: int) -> np.ndarray:
    """Kaldi's description, frame by frame in float64."""

    def mel(hz):
        return 1127.0 * np.log(1.0 + hz / 700.0)

    edges = np.linspace(mel(20.0), mel(8000.0), num_bins + 2)
    bins = mel(np.arange(257) * 16000 / 512)
    rows = []
    for start in range(0, len(waveform) - 399, 160):
        frame = waveform[start : start + 400].astype(np.float64) * 32768
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        frame = frame * (0.54 - 0.46 * np.cos(2 * np.pi * np.arange(400) / 399))
        power = np.abs(np.fft.rfft(frame, 512)) ** 2
        row = []
        for left, centre, right in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
            weights = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clip(min=0)
            row.append(np.log((weights * power).sum()))
        rows.append(row)
    return np.array(rows)


def test_fbank_is_the_plain_formula():
    (clip,) = noises(4000)
    features, num_frames = kaldi_fbank(clip[None], torch.tensor([4000]), 40)
    assert num_frames.tolist() == [23]
    np.testing.assert_allclose(features[0].numpy(), plain_fbank(clip.numpy(), 40), atol=2e-3)


def test_log_mel_is_whispers():
    (clip,) = noises(8123)
    reference = WhisperFeatureExtractor(feature_size=128)(clip.numpy(), sampling_rate=16000, padding=False)
    features, num_frames = log_mel(clip[None], torch.tensor([8123]), 128)
    np.testing.assert_allclose(
        normalise_log_mel(features, num_frames)[0].numpy(), reference["input_features"][0].T, atol=1e-4
    )


@pytest.mark.parametrize("kind", [kaldi_fbank, log_mel])
def test_padding_never_reaches_a_clip(kind):
    clips = noises(4000, 1234, 8000)
    together, counts = kind(*pad_clips(clips), 80)
    for row, count, clip in zip(together, counts.tolist(), clips, strict=True):
        alone, number = kind(clip[None], torch.tensor([len(clip)]), 80)
        assert number.tolist() == [count]
        torch.testing.assert_close(row[:count], alone[0, :count], atol=1e-4, rtol=1e-4)


def test_normalisation_uses_the_clips_own_maximum():
    clips = noises(4000, 8000)
    clips[0] *= 0.01
    features, counts = log_mel(*pad_clips(clips), 80)
    together = normalise_log_mel(features, counts)
    alone = normalise_log_mel(features[:1, : counts[0]], counts[:1])
    torch.testing.assert_close(together[0, : counts[0]], alone[0])
    assert together[0, counts[0] :].abs().max() == 0


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16000, 98)])
def test_frame_counts(samples, frames):
    assert num_kaldi_frames(torch.tensor([samples])).tolist() == [frames]
    assert kaldi_fbank(torch.zeros(1, samples), torch.tensor([samples]))[1].tolist() == [frames]


@pytest.mark.parametrize("length", [1, 3, 6, 7, 12, 13, 20])
def test_stacked_frames_repeat_the_ends(length):
    clip = torch.arange(1.0, length + 1)[:, None]
    features = torch.zeros(2, 25, 1)
    features[0, :length] = clip
    features[1] = 1.0
    stacked, counts = stack_frames(features, torch.tensor([length, 25]), 7, 6)
    assert counts.tolist() == [-(-length // 6), 5]
    for index in range(int(counts[0])):
        wanted = [clip[min(max(6 * index - 3 + place, 0), length - 1), 0] for place in range(7)]
        assert stacked[0, index].tolist() == wanted
    assert stacked[0, int(counts[0]) :].abs().sum() == 0
