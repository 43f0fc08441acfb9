import itertools

import numpy as np
import pytest
import soundfile
import torch

from stepaudio_train.audio import AudioError, peak_normalise, resample
from stepaudio_train.audio.preprocessing import TTS_PROMPT
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.tokenizers.dual import merge_streams
from stepaudio_train.tokenizers.dual_tokenizer import DualTokenizer
from stepaudio_train.tokenizers.vocabulary import Modality


@pytest.fixture(scope="module")
def tokenizer() -> DualTokenizer:
    return DualTokenizer(small_speech_tokenizer())


def noise(num_samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def test_ids_are_the_merged_codes_of_the_released_vocabulary(tokenizer):
    waveform = noise(20000)
    ids = tokenizer.encode(waveform)
    (codes,) = tokenizer.speech.encode([waveform])
    np.testing.assert_array_equal(ids, merge_streams(codes.linguistic, codes.semantic, tokenizer.vocabulary))
    assert len(ids) == 10 * 5
    groups = ids.reshape(-1, 5)
    assert (groups[:, :2] >= 65536).all() and (groups[:, :2] < 66560).all() and (groups[:, 2:] >= 66560).all()
    decoded = tokenizer.decode(ids)
    np.testing.assert_array_equal(decoded.linguistic, codes.linguistic[:20])
    np.testing.assert_array_equal(decoded.semantic, codes.semantic[:30])
    assert tokenizer.to_text(ids).startswith(f"<audio_{codes.linguistic[0]}><audio_{codes.linguistic[1]}>")
    np.testing.assert_array_equal(tokenizer.from_text(tokenizer.to_text(ids)), ids)


@pytest.mark.parametrize("rate_hz", [8000, 16000, 44100, 48000])
def test_files_and_samples_of_any_rate_and_channels_agree(tokenizer, tmp_path, rate_hz):
    stereo = torch.stack([noise(rate_hz, 1), noise(rate_hz, 2)])
    soundfile.write(tmp_path / "a.wav", stereo.T.numpy(), rate_hz, subtype="FLOAT")
    ids = tokenizer.encode(stereo, rate_hz)
    np.testing.assert_array_equal(tokenizer.encode(tmp_path / "a.wav"), ids)
    np.testing.assert_array_equal(tokenizer.encode(resample(stereo.mean(0), rate_hz, 16000)), ids)
    assert len(ids) == 8 * 5


def test_a_batch_gives_what_each_gives_alone(tokenizer):
    clips = [noise(n, n) for n in (0, 1, 160, 5000, 33000, 1920)] + [torch.zeros(16000)]
    for ids, clip in zip(tokenizer.encode_batch(clips), clips, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(clip))
    assert [len(tokenizer.encode(clip)) for clip in clips[:3]] == [0, 0, 0]


def test_preprocessing_is_applied_once(tokenizer):
    waveform = torch.cat([torch.zeros(8000), noise(12000), torch.zeros(8000)])
    prompt = tokenizer.encode(waveform, preprocessing=TTS_PROMPT)
    (codes,) = tokenizer.speech.encode([TTS_PROMPT.apply(waveform)], peak_norm=False)
    np.testing.assert_array_equal(prompt, merge_streams(codes.linguistic, codes.semantic, tokenizer.vocabulary))
    assert len(prompt) < len(tokenizer.encode(waveform))
    loud = peak_normalise(waveform)
    np.testing.assert_array_equal(tokenizer.encode(loud * 0.5), tokenizer.encode(waveform))


def test_times_cover_each_stream_without_gaps(tokenizer):
    times = tokenizer.timestamps(tokenizer.encode(noise(16000)))
    assert len(times) == 40
    for modality, length_s in ((Modality.LINGUISTIC, 0.06), (Modality.SEMANTIC, 0.04)):
        own = [time for time in times if time.modality == modality]
        assert own[0].start_s == 0 and own[-1].end_s == pytest.approx(0.96)
        assert all(time.end_s - time.start_s == pytest.approx(length_s) for time in own)
        assert all(first.end_s == second.start_s for first, second in itertools.pairwise(own))


def test_wrong_samples_are_refused(tokenizer):
    with pytest.raises(AudioError, match=r"int16"):
        tokenizer.encode(torch.zeros(100, dtype=torch.int16))
    with pytest.raises(AudioError, match=r"no\.wav"):
        tokenizer.encode("no.wav")
