"""Recordings that cannot be heard: by how much, measured on the parts that the mixture is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stepaudio_train.audio.conditions import (
    CONDITIONS,
    KEPT_SHARE,
    NOISY_SNR_DB,
    ROOM_DB,
    active_level,
    in_condition,
)
from stepaudio_train.audio.speech_like import speech_like

RATE_HZ = 16000


def recording(seed: int = 0) -> torch.Tensor:
    """Half a second of silence, two of something like speech, half a second of silence."""
    return F.pad(speech_like(2 * RATE_HZ, seed), (RATE_HZ // 2, RATE_HZ // 2))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_seed_alone_decides(condition):
    first, again, other = (in_condition(recording(), condition, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and first.dtype == torch.float32 and first.isfinite().all()
    assert (condition == "clear") == (first.shape == other.shape and torch.equal(first, other))
    assert first.abs().max() <= 0.99 or condition == "clear"


def test_speech_and_its_edges_are_found():
    # Alternating samples of 0.5 have a power of 0.25, whatever silence is around them.
    loud = 0.5 * torch.ones(RATE_HZ) * torch.tensor([1.0, -1.0]).repeat(RATE_HZ // 2)
    power, start, end = active_level(F.pad(loud, (3200, 6400)))
    assert power == pytest.approx(0.25) and (start, end) == (3200, 3200 + RATE_HZ)
    # A second part is quieter by 10 dB: it is speech too; by 30 dB: it is none.
    for db, expected_end in ((-10, 2 * RATE_HZ), (-30, RATE_HZ)):
        assert active_level(torch.cat([loud, loud * 10 ** (db / 20)]))[2] == expected_end


def test_noise_hides_speech_in_every_band():
    clear = recording(1) / 100  # so quiet that the mixture need not be turned down
    noise = (in_condition(clear, "noisy", 5) - clear).double()
    power, start, end = active_level(clear)
    assert 10 * math.log10(power / float(noise.square().mean())) == pytest.approx(NOISY_SNR_DB, abs=0.01)
    of_speech, of_noise = _octave_powers(clear[start:end]), _octave_powers(noise)
    by_band_db = 10 * np.log10(of_speech / of_noise)
    assert by_band_db.max() < -15  # what the speech intelligibility index counts as nothing
    assert np.ptp(by_band_db) < 1


def test_a_loud_mixture_is_turned_down_as_a_whole():
    quiet, loud = (in_condition(recording(1) * gain, "noisy", 5) for gain in (0.01, 1.0))
    assert loud.abs().max() == pytest.approx(0.99)
    assert torch.allclose(loud, quiet * (0.99 / quiet.abs().max()), atol=1e-5)


def _octave_powers(waveform: torch.Tensor) -> np.ndarray:
    """Mean power of a sample from the octaves that begin at 125 Hz to 2 kHz."""
    power = np.abs(np.fft.rfft(waveform.numpy())) ** 2 / len(waveform) ** 2
    frequencies = np.fft.rfftfreq(len(waveform), 1 / RATE_HZ)
    return np.array(
        [power[(frequencies >= low) & (frequencies < 2 * low)].sum() for low in (125, 250, 500, 1000, 2000)]
    )


def test_noise_is_steady_where_speech_is_not():
    clear = recording(2)
    noisy = in_condition(clear, "noisy", 0)
    level_db = 10 * np.log10(noisy.view(-1, 1600).square().mean(dim=1).numpy())
    assert level_db.max() - level_db.min() < 6  # also over the half seconds without speech


@pytest.mark.parametrize("seed", range(5))
def test_a_cut_recording_keeps_the_beginning_of_the_speech(seed):
    clear = recording(seed)
    _, start, end = active_level(clear)
    cut = in_condition(clear, "cut", seed)
    assert torch.equal(cut, clear[: len(cut)])
    assert KEPT_SHARE[0] <= (len(cut) - start + 1) / (end - start) <= KEPT_SHARE[1]


def test_a_short_recording_is_filled_up_to_two_groups():
    clear = speech_like(RATE_HZ // 2)
    cut = in_condition(clear, "cut", 0)
    assert len(cut) == 3840 and not cut[RATE_HZ // 8 :].any()


def test_silence_has_the_level_of_a_room_and_nothing_of_the_speech():
    clear = recording()
    silent = in_condition(clear, "silent", 0)
    level_db = 10 * math.log10(silent.square().mean())
    assert len(silent) == len(clear) and ROOM_DB[0] - 0.1 < level_db < ROOM_DB[1] + 0.1
    assert torch.equal(silent, in_condition(torch.zeros(len(clear)), "silent", 0))


@pytest.mark.parametrize("condition", ["noisy", "cut"])
@pytest.mark.parametrize("nothing", [torch.zeros(1600), torch.zeros(0)])
def test_nothing_cannot_be_hidden(condition, nothing):
    with pytest.raises(ValueError, match="holds no sound"):
        in_condition(nothing, condition, 0)
