import math

import numpy as np
import pytest
import torch

from stepaudio_train.audio import resample
from stepaudio_train.audio.preprocessing import CHAT, EDIT_PROMPT, TTS_PROMPT, trim_silence


def burst(num_samples: int, start: int, stop: int) -> torch.Tensor:
    """A tone that swells and dies away around start..stop."""
    place = torch.arange(num_samples).double()
    envelope = torch.exp(-(((place - (start + stop) / 2) / ((stop - start) / 2)) ** 4))
    return (0.3 * torch.sin(place * 0.07) * envelope).float()


# First sample and end as librosa 0.11's effects.trim(top_db=20, frame_length=512, hop_length=128) finds them.
FOUND_BY_LIBROSA = [
    ((16000, 4000, 9000), (3456, 9728)),
    ((16000, 0, 3000), (0, 3456)),
    ((16000, 14000, 16500), (13696, 16000)),
    ((30001, 200, 29000), (0, 30001)),
    ((700, 100, 500), (0, 700)),
]


@pytest.mark.parametrize(("signal", "found"), FOUND_BY_LIBROSA)
def test_trimming_keeps_what_the_released_code_keeps(signal, found):
    waveform, (start, stop) = burst(*signal), found
    trimmed = trim_silence(waveform)
    assert len(trimmed) == math.ceil((stop - start) / 240) * 240 + 4320
    wanted = np.zeros(len(trimmed), dtype=np.float32)
    for place in range(len(wanted)):
        source = start - 800 + place
        if 0 <= source < len(waveform):
            wanted[place] = waveform[source]
    np.testing.assert_array_equal(trimmed.numpy(), wanted)


def test_silence_is_not_trimmed():
    assert trim_silence(torch.zeros(16000)).tolist() == [0.0] * 20400
    assert len(trim_silence(torch.ones(1))) == 240 + 4320


def test_presets():
    waveform = burst(16000, 4000, 9000) * 3
    chat, prompt = CHAT.apply(waveform), TTS_PROMPT.apply(waveform)
    assert len(chat) == 16000 and len(prompt) == 10800
    assert float(chat.abs().max()) == pytest.approx(0.999) == float(prompt.abs().max())
    torch.testing.assert_close(EDIT_PROMPT.apply(waveform), prompt)
    # A peak under 0.01 is taken for 0.01.
    assert float(CHAT.apply(torch.full((100,), 0.001)).max()) == pytest.approx(0.0999)
    assert len(TTS_PROMPT.apply(torch.zeros(0))) == 0


def by_the_formula(x: np.ndarray, from_hz: int, to_hz: int, at: int) -> float:
    """One sample of the resampled signal, straight from the sum over all of the original, in float64."""
    rate = min(from_hz, to_hz) * 0.99
    distance = (np.arange(len(x)) / from_hz - at / to_hz) * rate
    near = np.abs(distance) < 6
    window = np.cos(distance[near] * np.pi / 12) ** 2
    return float(np.sum(x[near] * np.sinc(distance[near]) * window) * rate / from_hz)


@pytest.mark.parametrize("rates", [(44100, 16000), (48000, 16000), (22050, 16000), (8000, 16000), (17600, 16000)])
@pytest.mark.parametrize("length", [1, 2, 479, 3001])
def test_resampling_is_the_windowed_sinc(rates, length):
    x = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    resampled = resample(torch.from_numpy(x), *rates).numpy()
    assert len(resampled) == math.ceil(length * rates[1] / rates[0])
    places = sorted({*range(min(20, len(resampled))), *range(0, len(resampled), 97), len(resampled) - 1})
    wanted = [by_the_formula(x.astype(np.float64), *rates, at) for at in places]
    np.testing.assert_allclose(resampled[places], wanted, atol=2e-6)


def test_long_recordings_are_resampled_without_seams(monkeypatch):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    whole = resample(x, 44100, 16000)
    monkeypatch.setattr("stepaudio_train.audio.resampling._BLOCK_SAMPLES", 1000)
    torch.testing.assert_close(resample(x, 44100, 16000), whole, atol=1e-6, rtol=0)
