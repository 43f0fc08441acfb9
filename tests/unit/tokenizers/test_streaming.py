import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stepaudio_train.audio import peak_normalise
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.tokenizers.dual import merge_streams
from stepaudio_train.tokenizers.speech import SpeechTokenizer
from stepaudio_train.tokenizers.streaming import DualStream, SpeechStream, gain_for_peak
from stepaudio_train.tokenizers.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> SpeechTokenizer:
    return small_speech_tokenizer()


def clip(num_samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_samples)
    return 0.2 * torch.sin(torch.arange(num_samples) / 700.0) * torch.randn(num_samples, generator=generator)


def cuts(waveform: torch.Tensor, largest: int) -> list[torch.Tensor]:
    sizes, rng = [], np.random.default_rng(len(waveform))
    while sum(sizes) < len(waveform):
        sizes.append(min(int(rng.integers(1, largest)), len(waveform) - sum(sizes)))
    return list(waveform.split(sizes)) if sizes else []


@pytest.mark.parametrize("samples", [0, 1, 160, 399, 400, 879, 880, 3839, 3840, 3841, 4719, 4720, 8000, 46080, 100001])
@pytest.mark.parametrize("largest", [700, 20000])
def test_a_stream_gives_what_the_whole_recording_gives(tokenizer, samples, largest):
    rule = tokenizer.with_pieces(piece_tokens=12, context_tokens=25)
    waveform = clip(samples)
    (whole,) = rule.encode([waveform], peak_norm=False)
    stream = SpeechStream(rule)
    parts = [stream.feed(part) for part in cuts(waveform, largest)] + [stream.finish()]
    np.testing.assert_array_equal(np.concatenate([part.linguistic for part in parts]), whole.linguistic)
    np.testing.assert_array_equal(np.concatenate([part.semantic for part in parts]), whole.semantic)


def test_the_released_rule_streams_too(tokenizer):
    waveform = clip(31 * 16000)
    (whole,) = tokenizer.encode([waveform], peak_norm=False)
    stream = SpeechStream(tokenizer)
    first = stream.feed(waveform[: 30 * 16000])
    assert (len(first.linguistic), len(first.semantic)) == (500, 750)
    rest, last = stream.feed(waveform[30 * 16000 :]), stream.finish()
    assert len(rest.semantic) == 0
    np.testing.assert_array_equal(np.concatenate([first.semantic, last.semantic]), whole.semantic)
    np.testing.assert_array_equal(
        np.concatenate([first.linguistic, rest.linguistic, last.linguistic]), whole.linguistic
    )


def test_codes_come_as_soon_as_their_chunk_is_complete(tokenizer):
    stream = SpeechStream(tokenizer.with_pieces(piece_tokens=6, context_tokens=0))
    waveform = clip(3 * 3840)
    counts = [len(stream.feed(waveform[start : start + 1920]).linguistic) for start in range(0, len(waveform), 1920)]
    assert counts == [0, 4, 0, 4, 0, 4]


def test_groups_come_merged_and_a_saved_state_goes_on_elsewhere(tokenizer, tmp_path):
    rule = tokenizer.with_pieces(piece_tokens=9, context_tokens=0)
    vocabulary = Vocabulary(text_size=400)
    waveform = clip(50000) * 3
    (whole,) = rule.encode([waveform])
    stream = DualStream(rule, vocabulary)
    ids = []
    for number, part in enumerate(cuts(waveform * gain_for_peak(float(waveform.abs().max())), 5000)):
        if number % 3 == 2:
            save_file(stream.state(), tmp_path / "stream.safetensors")
            stream = DualStream(rule, vocabulary)
            stream.load_state(load_file(tmp_path / "stream.safetensors"))
        ids.append(stream.feed(part))
        assert len(ids[-1]) % 5 == 0
    ids.append(stream.finish())
    assert sum(len(part) > 0 for part in ids) > 5
    np.testing.assert_array_equal(np.concatenate(ids), merge_streams(whole.linguistic, whole.semantic, vocabulary))


def test_the_gain_is_what_peak_normalisation_applies():
    for waveform in (clip(800), clip(800) * 1e-4):
        scaled = waveform * gain_for_peak(float(waveform.abs().max()))
        torch.testing.assert_close(scaled, peak_normalise(waveform))
