"""The speech decoder: tokens to sound, at once and in a stream, from files, and no noise for tokens that are none."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.decoder import FlowConfig, FlowSolverConfig, FlowStreamConfig
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.speaker import SpeakerEncoderConfig
from stepaudio_train.config.vocoder import MelConfig, VocoderConfig
from stepaudio_train.models.decoder import speech_decoder
from stepaudio_train.models.decoder.flow import FlowError, FlowMatching
from stepaudio_train.models.decoder.flow_files import NoSpeaker, load_flow, save_flow
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder, audio_ids
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import save_vocoder
from stepaudio_train.models.decoder.weights import DecoderWeightError
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.tokenizers.speech import SpeechTokens

FLOW = FlowConfig(
    hidden_size=32, ffn_size=32, num_blocks=1, decoder_channels=32, decoder_head_size=16, decoder_mid_blocks=1
)
VOCODER = VocoderConfig(base_channels=16, f0_channels=16, resblock_kernels=(3,), num_harmonics=2)
SOLVER = FlowSolverConfig(num_steps=2)
HOP = FLOW.hop_samples


@pytest.fixture(scope="module")
def decoder() -> SpeechDecoder:
    torch.manual_seed(0)
    return SpeechDecoder(FlowMatching(FLOW), HiFTGenerator(VOCODER), NoSpeaker(192), SOLVER, "cpu")


def speech(groups: int, seed: int = 0) -> SpeechTokens:
    random = np.random.default_rng(seed)
    linguistic, semantic = (random.integers(0, size, n * groups) for size, n in ((1024, 2), (4096, 3)))
    return SpeechTokens(linguistic.astype(np.int32), semantic.astype(np.int32))


def voice(seconds: float = 1.0) -> Tensor:
    return speech_like(round(16000 * seconds))


# Whole clips


def test_neighbours_and_what_is_left_over_change_nothing(decoder):
    clips = [speech(8), speech(3, 1), speech(13, 2)]
    longer = SpeechTokens(np.append(clips[1].linguistic, 5), np.append(clips[1].semantic, [6, 7]))
    prompts = [decoder.prompt(voice())] * 3
    together = decoder.decode([clips[0], longer, clips[2]], prompts)
    for clip, prompt, waveform in zip(clips, prompts, together, strict=True):
        assert waveform.shape == (HOP * FLOW.num_frames(5 * len(clip.linguistic) // 2),)
        torch.testing.assert_close(decoder.decode([clip], [prompt])[0], waveform, atol=1e-4, rtol=1e-3)
    assert decoder.decode([], []) == []


def test_a_prompt_with_tokens_and_one_without_differ(decoder):
    waveform = voice()
    codes = small_speech_tokenizer().encode([waveform])[0]
    whole, voice_alone = decoder.prompt(waveform, codes), decoder.prompt(waveform)
    assert len(whole.mel) == FLOW.num_frames(len(whole.tokens)) > 0 == len(voice_alone.mel)
    first, second = decoder.decode([speech(4)] * 2, [whole, voice_alone])
    assert first.shape == second.shape and not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(UserError, match="tokenize it again"):
        decoder.prompt(voice(2.0), codes)


# Streams


def test_a_stream_of_one_chunk_is_the_whole_clip(decoder):
    codes, prompt = speech(6), decoder.prompt(voice())
    stream = decoder.stream(prompt, FlowStreamConfig(chunk_tokens=100))
    ids = audio_ids(codes).numpy()
    pieces = [stream.feed(ids[:7]), stream.feed(ids[7:]), stream.finish()]
    torch.testing.assert_close(torch.cat(pieces), decoder.decode([codes], [prompt])[0], atol=1e-4, rtol=1e-3)


def test_a_stream_gives_every_sample_however_it_is_fed(decoder):
    ids, prompt = audio_ids(speech(30)).numpy(), decoder.prompt(voice())
    wholes = []
    for size in (1, 8, 150):
        stream = decoder.stream(prompt)
        assert stream.first_audio_s is None
        pieces = [stream.feed(ids[start : start + size]) for start in range(0, len(ids), size)]
        wholes.append(torch.cat([*pieces, stream.finish()]))
        early = torch.cat(pieces)
        assert 0 < len(early) < len(wholes[-1]) == HOP * FLOW.num_frames(len(ids))
        assert stream.first_audio_s is not None and 0 < stream.first_audio_s < 60
    for whole in wholes[1:]:
        torch.testing.assert_close(whole, wholes[0], atol=1e-4, rtol=1e-3)


def test_long_clips_are_made_as_they_are_streamed(decoder, monkeypatch):
    clips, prompt = [speech(12), speech(30, 1), speech(31, 2)], decoder.prompt(voice())
    whole = decoder.decode(clips, [prompt] * 3)
    monkeypatch.setattr(speech_decoder, "_LONGEST_TOKENS", 100)
    short, *long = decoder.decode(clips, [prompt] * 3)
    torch.testing.assert_close(short, whole[0], atol=1e-4, rtol=1e-3)
    for clip, waveform, other in zip(clips[1:], long, whole[1:], strict=True):
        stream = decoder.stream(prompt)
        assert torch.equal(torch.cat([stream.feed(audio_ids(clip)), stream.finish()]), waveform)
        assert waveform.shape == other.shape and not torch.allclose(waveform, other, atol=1e-3)


def test_an_empty_stream_is_silent(decoder):
    stream = decoder.stream(decoder.prompt(voice()))
    assert len(stream.finish()) == 0 and stream.first_audio_s is None


# Tokens that are none


@pytest.mark.parametrize(
    ("linguistic", "semantic", "message"),
    [
        ([65540, 1], [1, 2, 3], "linguistic code 65540 at position 0 is outside 0..1023"),
        ([0, 1], [1, 2, 5120], "semantic code 5120 at position 2 is outside 0..4095"),
        ([0, -1], [1, 2, 3], "linguistic code -1 at position 1"),
        ([0] * 8, [1, 2, 3], "8 linguistic and 3 semantic codes are not of one recording"),
        ([0], [1, 2], "holds no whole group"),
        ([], [], "holds no whole group"),
    ],
)
def test_wrong_codes_are_named(decoder, linguistic, semantic, message):
    wrong = SpeechTokens(np.asarray(linguistic, np.int32), np.asarray(semantic, np.int32))
    with pytest.raises(FlowError, match=f"clip 1: {message}"):
        decoder.decode([speech(2), wrong], [decoder.prompt(voice())] * 2)


def test_wrong_ids_leave_a_stream_as_it_was(decoder):
    ids = audio_ids(speech(8)).numpy()
    stream, undisturbed = (decoder.stream(decoder.prompt(voice())) for _ in range(2))
    pieces = [stream.feed(ids[:12])]
    with pytest.raises(FlowError, match=r"id 65700 at position 2 should be semantic.*without the text vocabulary"):
        stream.feed([65700, 65701])
    with pytest.raises(FlowError, match=r"id 5120 at position 2 should be semantic"):
        stream.feed([5120])
    with pytest.raises(FlowError, match=r"ends with 2 token\(s\) of a group of 5"):
        stream.finish()
    pieces += [stream.feed(ids[12:]), stream.finish()]
    assert torch.equal(torch.cat(pieces), torch.cat([undisturbed.feed(ids), undisturbed.finish()]))


# Files


def test_a_decoder_returns_from_its_files(decoder, tmp_path):
    save_flow(decoder.flow, tmp_path)
    save_vocoder(decoder.vocoder, tmp_path / "vocoder")
    encoder = SmallSpeakerEncoder(SpeakerEncoderConfig(channels=8))
    encoder.save(tmp_path / "speaker.safetensors")
    loaded = SpeechDecoder.from_directory(tmp_path, tmp_path / "vocoder", SOLVER, "cpu")
    prompt = loaded.prompt(voice())
    assert torch.equal(prompt.speaker, encoder.eval().embed(voice()))
    assert torch.equal(loaded.decode([speech(3)], [prompt])[0], decoder.decode([speech(3)], [prompt])[0])
    with pytest.raises(DecoderWeightError, match=r"hift\.json"):
        SpeechDecoder.from_directory(tmp_path)


def test_files_and_settings_that_cannot_be_are_named(decoder, tmp_path):
    with pytest.raises(DecoderWeightError, match=r"flow\.json: cannot be read as a FlowConfig"):
        load_flow(tmp_path)
    save_flow(decoder.flow, tmp_path)
    settings = tmp_path / "flow.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"num_blocks": 2}))
    with pytest.raises(FlowError, match="not of the configured sizes"):
        load_flow(tmp_path)
    other = HiFTGenerator(replace(VOCODER, mel=MelConfig(sample_rate_hz=24000)))
    with pytest.raises(FlowError, match="flow and vocoder do not fit"):
        SpeechDecoder(decoder.flow, other, NoSpeaker(192))
    with pytest.raises(ConfigError, match="num_steps=0"):
        SpeechDecoder(decoder.flow, decoder.vocoder, NoSpeaker(192), FlowSolverConfig(num_steps=0))
    with pytest.raises(ConfigError, match="chunk_tokens=0"):
        decoder.stream(decoder.prompt(voice()), FlowStreamConfig(chunk_tokens=0))
