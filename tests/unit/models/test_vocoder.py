"""The vocoder: released names, its parts against plain formulas, streams against whole clips, and learning."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepaudio_train.audio.mel import decoder_log_mel
from stepaudio_train.audio.resampling import resample
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.vocoder import MelConfig, VocoderConfig, vocoder_problems
from stepaudio_train.models.decoder.vocoder import HarmonicSource, HiFTGenerator
from stepaudio_train.models.decoder.vocoder_stream import VocoderStream
from stepaudio_train.objectives.vocoder import mel_loss

SHARED = Path(__file__).resolve().parents[4] / "shared"
SHAPES = SHARED / "reference" / "shapes" / "cosyvoice_tts3b_hift.json"
RATE_HZ, HOP = 22050, 256
TINY = VocoderConfig(base_channels=16, f0_channels=16)
THREE_STAGES = VocoderConfig(
    mel=MelConfig(sample_rate_hz=24000, window_samples=1920, hop_samples=480),
    base_channels=16,
    upsample_rates=(8, 5, 3),
    upsample_kernels=(16, 11, 7),
    source_kernels=(7, 7, 11),
    f0_channels=16,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vocoder(config: VocoderConfig = TINY) -> HiFTGenerator:
    """With a voice: the pitch is around 150 Hz and follows the mel."""
    torch.manual_seed(0)
    made = HiFTGenerator(config)
    with torch.no_grad():
        made.f0_predictor.classifier.weight.mul_(100)
        made.f0_predictor.classifier.bias.fill_(150)
    return made


def mel_frames(num_frames: int, batch_size: int = 1) -> Tensor:
    return torch.randn(batch_size, 80, num_frames, generator=seeded(1)) * 2 - 5


@pytest.mark.skipif(not SHAPES.is_file(), reason="needs the released shapes in ../shared")
def test_full_size_has_the_released_names_and_shapes():
    state = HiFTGenerator(VocoderConfig.released()).state_dict()
    shapes = json.loads(SHAPES.read_text(encoding="utf-8"))
    assert {name: list(tensor.shape) for name, tensor in state.items()} == shapes
    assert list(state) == list(shapes)


def test_the_state_dict_returns_through_the_released_names():
    one, mel = vocoder(), mel_frames(6)
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    assert not any("parametrizations" in name for name in state)
    torch.manual_seed(1)
    other = HiFTGenerator(TINY)
    assert not torch.equal(other.conv_pre.weight, one.conv_pre.weight)
    other.load_state_dict(state)
    state["conv_pre.weight_g"] = 2 * state["conv_pre.weight_g"]
    longer = copy.deepcopy(other)
    longer.load_state_dict(state)
    torch.testing.assert_close(longer.conv_pre.weight, 2 * one.conv_pre.weight)
    assert torch.equal(other(mel, seeded()).waveform, one(mel, seeded()).waveform)


def test_a_part_keeps_the_names_of_what_holds_it():
    whole = torch.nn.ModuleDict({"vocoder": HiFTGenerator(TINY), "other": torch.nn.Linear(2, 2)})
    assert "vocoder.ups.0.weight_g" in whole.state_dict()
    whole.load_state_dict(whole.state_dict())


@pytest.mark.parametrize("config", [TINY, THREE_STAGES], ids=["released", "three stages"])
def test_a_frame_becomes_a_hop_of_samples(config):
    assert vocoder_problems(config) == []
    made = vocoder(config)(mel_frames(7, batch_size=2), seeded())
    assert made.waveform.shape == (2, 7 * config.mel.hop_samples)
    assert made.f0_hz.shape == (2, 7)


def test_the_same_seed_gives_the_same_sound():
    model, mel = vocoder(), mel_frames(6)
    assert torch.equal(model(mel, seeded(3)).waveform, model(mel, seeded(3)).waveform)
    assert not torch.equal(model(mel, seeded(3)).waveform, model(mel, seeded(4)).waveform)


def test_samples_stay_under_the_limit():
    model = vocoder()
    with torch.no_grad():
        model.conv_post.bias.fill_(20)
    waveform = model(mel_frames(4), seeded()).waveform
    assert waveform.isfinite().all()
    torch.testing.assert_close(waveform.abs().max(), torch.tensor(0.99))


def test_the_short_time_spectrum_is_inverted():
    model = HiFTGenerator(TINY)
    source = 0.5 * torch.randn(2, 4 * HOP, generator=seeded())
    spectrum = torch.complex(*model._stft(source).chunk(2, dim=1))
    assert spectrum.shape == (2, 9, HOP + 1)
    torch.testing.assert_close(torch.istft(spectrum, 16, 4, window=model.stft_window), source)
    # What the network gives is the logarithm of the magnitude, and an angle whose sine is the phase.
    bent = torch.polar(spectrum.abs(), spectrum.angle().sin())
    wanted = torch.istft(bent, 16, 4, window=model.stft_window)
    torch.testing.assert_close(model._istft(spectrum.abs().log(), spectrum.angle()), wanted)


def pure_source(**changes: float) -> HarmonicSource:
    return HarmonicSource(replace(TINY, noise_std=0.0, **changes))


@pytest.mark.parametrize("f0_hz", [100.0, 233.0])
def test_the_source_has_the_pitch_and_its_harmonics(f0_hz):
    source = pure_source()
    frames = 86
    sines, _ = source.sines(torch.full((1, frames), f0_hz), source.begin(1, seeded()), seeded())
    spectrum = torch.fft.rfft(sines[0] * torch.hann_window(frames * HOP)[:, None], dim=0).abs()
    found_hz = spectrum.argmax(dim=0) * RATE_HZ / (frames * HOP)
    assert sines.shape == (1, frames * HOP, 9)
    wanted_hz = f0_hz * torch.arange(1, 10)
    assert (found_hz - wanted_hz).abs().max() <= RATE_HZ / (frames * HOP)
    torch.testing.assert_close(sines.abs().amax(dim=1), torch.full((1, 9), 0.1), atol=1e-3, rtol=0)


def test_the_phase_is_the_sum_of_the_pitch():
    source = pure_source()
    f0_hz = torch.tensor([[100.0, 200.0, 150.0]])
    sines, state = source.sines(f0_hz, source.begin(1, seeded()), seeded())
    cycles = (f0_hz.double() / RATE_HZ).repeat_interleave(HOP, dim=1).cumsum(dim=1)
    torch.testing.assert_close(sines[:, :, 0], (0.1 * (2 * math.pi * cycles).sin()).float())
    torch.testing.assert_close(state.cycles, cycles[:, -1] % 1)


def test_without_a_voice_the_source_is_noise():
    source = HarmonicSource(TINY)
    f0_hz = torch.tensor([[10.0] * 40 + [10.1] * 40])
    sines, _ = source.sines(f0_hz, source.begin(1, seeded()), seeded())
    silent, voiced = sines[0, : 40 * HOP], sines[0, 40 * HOP :]
    assert silent.std().item() == pytest.approx(0.1 / 3, rel=0.02)
    clean, _ = pure_source().sines(f0_hz, source.begin(1, seeded()), seeded())
    assert (voiced - clean[0, 40 * HOP :]).std().item() == pytest.approx(0.003, rel=0.02)


@pytest.mark.parametrize("config", [TINY, THREE_STAGES, VocoderConfig(base_channels=8, resblock_kernels=(3, 11))])
def test_a_frame_depends_on_its_context_and_no_more(config):
    model = HiFTGenerator(config).double()
    context, hop = model.context_frames(), config.mel.hop_samples
    middle, frames = context + 3, 2 * context + 7
    mel = torch.randn(1, 80, frames, dtype=torch.float64, generator=seeded()).requires_grad_()
    source = torch.randn(1, frames * hop, dtype=torch.float64, generator=seeded()).requires_grad_()
    # Squares: a plain sum of samples could be blind to what adds up to nothing.
    model.decode(mel, source)[0, middle * hop : (middle + 1) * hop].square().sum().backward()
    reached = mel.grad.abs().sum(dim=(0, 1)) + source.grad.view(frames, hop).abs().sum(dim=1)
    seen = reached.nonzero().flatten()
    assert seen.min() >= middle - context
    assert seen.max() <= middle + context
    assert seen.max() - seen.min() >= 2 * context - 4


@pytest.mark.parametrize("config", [TINY, THREE_STAGES], ids=["released", "three stages"])
@pytest.mark.parametrize(
    "sizes", [(120,), (1,) * 60, (5, 50, 1, 7, 40, 3), (3,)], ids=["whole", "ones", "mixed", "short"]
)
def test_a_stream_gives_the_samples_of_the_whole_clip(config, sizes):
    model, mel = vocoder(config), mel_frames(sum(sizes))
    with torch.no_grad():
        whole = model(mel, seeded()).waveform
    stream = VocoderStream(model, seeded())
    pieces = [stream.feed(part) for part in mel.split(sizes, dim=2)]
    behind = mel.shape[2] - sum(piece.shape[1] for piece in pieces) // config.mel.hop_samples
    assert behind == min(stream.look_ahead_frames, mel.shape[2])
    streamed = torch.cat([*pieces, stream.finish()], dim=1)
    torch.testing.assert_close(streamed, whole, atol=2e-6, rtol=0)


def test_a_stream_remembers_little():
    stream = VocoderStream(vocoder(), seeded())
    for part in mel_frames(300).split(10, dim=2):
        stream.feed(part)
    assert stream._mel.shape[2] <= 2 * stream.look_ahead_frames
    assert stream._source.shape[1] <= 2 * stream.look_ahead_frames * HOP


def test_an_empty_stream_is_silent():
    assert VocoderStream(vocoder(), seeded()).finish().shape == (1, 0)


def test_a_few_steps_bring_the_mel_nearer():
    torch.manual_seed(0)
    clip = resample(speech_like(12000), 16000, RATE_HZ)[None, : 48 * HOP]
    mel = decoder_log_mel(clip, TINY.mel)
    model = HiFTGenerator(TINY)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        loss = mel_loss(clip, model(mel, seeded(step)).waveform, TINY.mel)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"upsample_rates": (8, 4)}, "type mel.hop_samples=128"),
        ({"upsample_kernels": (16,)}, "must be as many as upsample_rates"),
        ({"upsample_kernels": (16, 15)}, "upsample_kernels=15"),
        ({"resblock_kernels": (4,)}, "must be odd"),
        ({"base_channels": 30}, "type base_channels=32"),
        ({"stft_samples": 6}, "stft_samples=6"),
        ({"num_harmonics": -1}, "type num_harmonics=8"),
    ],
)
def test_wrong_sizes_are_told(changes, told):
    assert any(told in problem for problem in vocoder_problems(replace(TINY, **changes)))
    assert vocoder_problems(VocoderConfig()) == vocoder_problems(VocoderConfig.released()) == []
