"""Recordings to tokens and back to sound, on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.commands.resynthesize import ResynthesizeOptions, run_resynthesis
from stepaudio_train.config.decoder import FlowConfig
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.vocoder import VocoderConfig
from stepaudio_train.models.decoder.flow import FlowMatching
from stepaudio_train.models.decoder.flow_files import save_flow
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import save_vocoder
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer

FLOW = FlowConfig(
    hidden_size=32, ffn_size=32, num_blocks=1, decoder_channels=32, decoder_head_size=16, decoder_mid_blocks=1
)


@pytest.fixture
def options(tmp_path) -> ResynthesizeOptions:
    torch.manual_seed(0)
    save_flow(FlowMatching(FLOW), tmp_path / "decoder")
    save_vocoder(
        HiFTGenerator(VocoderConfig(base_channels=16, f0_channels=16, resblock_kernels=(3,))), tmp_path / "decoder"
    )
    small_speech_tokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    soundfile.write(tmp_path / "in" / "one.wav", speech_like(16000).numpy(), 16000)
    soundfile.write(tmp_path / "in" / "deep" / "two.flac", speech_like(8000, 1).numpy(), 8000)
    return ResynthesizeOptions(
        (tmp_path / "in",), tmp_path / "decoder", tmp_path / "tokenizer", tmp_path / "out", device="cpu"
    )


def duration_s(path: Path) -> float:
    with soundfile.SoundFile(path) as file:
        assert file.samplerate == 22050 and file.channels == 1
        return file.frames / file.samplerate


def test_every_recording_comes_back_as_long_as_its_groups(options):
    assert run_resynthesis(options) == 0
    assert sorted(path.name for path in options.output.rglob("*.*")) == ["one.wav", "two.wav"]
    assert duration_s(options.output / "one.wav") == pytest.approx(1.0, abs=0.13)
    assert duration_s(options.output / "deep" / "two.wav") == pytest.approx(1.0, abs=0.13)
    one = options.sources[0] / "one.wav"
    assert run_resynthesis(replace(options, sources=(one,), format="flac")) == 0
    assert duration_s(options.output / "one.flac") == duration_s(options.output / "one.wav")


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(options, capfd):
    folder = options.sources[0]
    (folder / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "short.wav", speech_like(900).numpy(), 16000)
    assert run_resynthesis(options) == 1
    told = capfd.readouterr().err
    assert "broken.wav: cannot be read as audio" in told and "short.wav: holds no whole group" in told
    assert sorted(path.name for path in options.output.rglob("*.*")) == ["one.wav", "two.wav"]


def test_names_that_would_collide_are_refused(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no recordings in it"):
        run_resynthesis(replace(options, sources=(tmp_path / "empty",)))
    with pytest.raises(UserError, match="and another recording too"):
        soundfile.write(options.sources[0] / "one.flac", speech_like(8000).numpy(), 16000)
        run_resynthesis(options)
    with pytest.raises(UserError, match="type another --output"):
        run_resynthesis(replace(options, sources=(options.sources[0] / "one.wav",), output=options.sources[0]))
