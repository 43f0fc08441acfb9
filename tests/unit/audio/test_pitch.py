import math

import pytest
import torch

from stepaudio_train.audio.pitch import yin

RATE_HZ = 16000


def tone(f0_hz, duration_s=0.5, rate_hz=RATE_HZ, harmonics=(1,)):
    """A tone whose pitch is a number, or a tensor with one for every sample."""
    f0_hz = torch.as_tensor(f0_hz, dtype=torch.float64).expand(round(duration_s * rate_hz))
    phase = 2 * math.pi * torch.cumsum(f0_hz / rate_hz, dim=0)
    return sum(torch.sin(phase * number) for number in harmonics).float() / len(harmonics)


def inner(f0_hz):
    """Without the frames that reach beyond the ends."""
    return f0_hz[3:-3]


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 48000])
@pytest.mark.parametrize("f0_hz", [60.0, 123.4, 311.1, 580.0])
def test_tones_have_their_pitch_at_any_rate(rate_hz, f0_hz):
    found = inner(yin(tone(f0_hz, rate_hz=rate_hz), rate_hz).f0_hz)
    assert found.tolist() == pytest.approx([f0_hz] * len(found), rel=2e-3)


def test_a_missing_fundamental_is_heard():
    found = inner(yin(tone(150.0, harmonics=(3, 4, 5)), RATE_HZ).f0_hz)
    assert found.tolist() == pytest.approx([150.0] * len(found), rel=2e-3)


def test_a_glide_is_followed_frame_by_frame():
    samples = RATE_HZ
    glide_hz = 100 * 2 ** (torch.arange(samples) / samples)
    f0_hz, hop = yin(tone(glide_hz, 1.0, harmonics=(1, 2, 3)), RATE_HZ, hop_s=0.02)
    assert hop == 320 and len(f0_hz) == 50
    wanted = glide_hz[hop // 2 :: hop]
    torch.testing.assert_close(inner(f0_hz), inner(wanted), rtol=0.02, atol=0)


def test_voices_stay_in_a_little_noise():
    noise = 0.03 * torch.randn(RATE_HZ // 2, generator=torch.Generator().manual_seed(0))
    found = inner(yin(tone(200.0, harmonics=(1, 2, 3)) + noise, RATE_HZ).f0_hz)
    assert found.tolist() == pytest.approx([200.0] * len(found), rel=0.02)


def test_noise_silence_and_constants_have_no_pitch():
    noise = torch.randn(RATE_HZ, generator=torch.Generator().manual_seed(0))
    assert (yin(noise, RATE_HZ).f0_hz > 0).float().mean() < 0.02
    assert not yin(torch.zeros(RATE_HZ), RATE_HZ).f0_hz.any()
    assert not inner(yin(torch.full((RATE_HZ,), 0.3), RATE_HZ).f0_hz).any()
    assert not yin(1e-6 * tone(200.0), RATE_HZ).f0_hz.any()


def test_a_long_recording_gives_the_frames_of_its_parts():
    voice = tone(100 + 50 * torch.rand(1, generator=torch.Generator().manual_seed(1)).item(), 12.0)
    whole, hop = yin(voice, RATE_HZ)
    assert len(whole) == 1200
    part = yin(voice[: 400 * hop], RATE_HZ).f0_hz
    torch.testing.assert_close(whole[3:390], part[3:390])


def test_what_is_shorter_than_a_frame_has_none():
    assert yin(torch.ones(100), RATE_HZ).f0_hz.shape == (0,)
