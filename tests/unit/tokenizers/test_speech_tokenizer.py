import copy
import json

import numpy as np
import pytest
import torch

from stepaudio_train.config.errors import UserError
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer

PIECE_SAMPLES = 30 * 16000


@pytest.fixture(scope="module")
def tokenizer() -> SpeechTokenizer:
    return small_speech_tokenizer()


def clip(num_samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    envelope = torch.sin(torch.arange(num_samples) / 700.0)
    return 0.2 * envelope * torch.randn(num_samples, generator=generator)


def test_a_batch_gives_each_clip_what_it_gets_alone(tokenizer):
    clips = [clip(length, seed) for seed, length in enumerate((16000, 2400, 31999, 480, 7000))]
    for together, waveform in zip(tokenizer.encode(clips), clips, strict=True):
        (alone,) = tokenizer.encode([waveform])
        np.testing.assert_array_equal(together.linguistic, alone.linguistic)
        np.testing.assert_array_equal(together.semantic, alone.semantic)
        assert len(alone.semantic) == ((len(waveform) // 160 + 1) // 2 + 1) // 2


def test_level_does_not_matter(tokenizer):
    loud, quiet = tokenizer.encode([clip(8000) * 0.9, clip(8000) * 0.09])
    np.testing.assert_array_equal(loud.linguistic, quiet.linguistic)
    np.testing.assert_array_equal(loud.semantic, quiet.semantic)


@pytest.mark.parametrize(
    ("samples", "linguistic", "semantic"), [(0, 0, 0), (1, 0, 0), (479, 0, 0), (480, 0, 1), (879, 0, 2), (880, 1, 2)]
)
def test_clips_too_short_for_a_code_have_none(tokenizer, samples, linguistic, semantic):
    codes = tokenizer.encode([clip(samples), clip(8000)])[0]
    assert (len(codes.linguistic), len(codes.semantic)) == (linguistic, semantic)


def test_long_recordings_are_encoded_in_pieces(tokenizer):
    waveform = clip(PIECE_SAMPLES + 8000)
    # The peak lies in the second piece: both are levelled by it.
    waveform[-100] = 2.0
    (whole,) = tokenizer.encode([waveform])
    assert len(whole.semantic) == 750 + 13
    levelled = waveform / 2.0 * 0.999
    ids, _ = tokenizer.semantic(levelled[None, :PIECE_SAMPLES], torch.tensor([PIECE_SAMPLES]))
    np.testing.assert_array_equal(whole.semantic[:750], ids[0])


def test_pieces_can_be_shorter_and_see_what_was_before(tokenizer):
    waveform = clip(16000) / 2
    short = tokenizer.with_pieces(piece_tokens=6, context_tokens=10)
    (codes,) = short.encode([waveform], peak_norm=False)
    assert len(codes.semantic) == 25
    # The second piece: 240 to 480 ms, heard from the beginning on; the fourth: 720 to 960 ms, heard from 320 ms on.
    for begin, stop, left_out, at in ((0, 7680, 6, 6), (5120, 15360, 10, 18)):
        ids, _ = tokenizer.semantic(waveform[None, begin:stop], torch.tensor([stop - begin]))
        np.testing.assert_array_equal(codes.semantic[at : at + 6], ids[0, left_out:])
    (whole,) = tokenizer.encode([waveform], peak_norm=False)
    np.testing.assert_array_equal(codes.linguistic, whole.linguistic)


@pytest.mark.parametrize(("piece_tokens", "context_tokens"), [(0, 0), (6, -1), (1000, 501)])
def test_pieces_that_no_encoder_can_hear_are_refused(tokenizer, piece_tokens, context_tokens):
    with pytest.raises(ValueError, match=f"piece_tokens={piece_tokens}, context_tokens={context_tokens}"):
        tokenizer.with_pieces(piece_tokens, context_tokens)


def test_bf16_changes_few_codes_and_no_counts(tokenizer):
    copies = copy.deepcopy((tokenizer.linguistic, tokenizer.semantic))
    fast = SpeechTokenizer(*copies, "cpu", "bf16")
    assert fast.linguistic.encoder.encoders0[0].feed_forward.w_1.weight.dtype == torch.bfloat16
    (exact,), (rounded,) = tokenizer.encode([clip(160000)]), fast.encode([clip(160000)])
    for first, second in ((exact.linguistic, rounded.linguistic), (exact.semantic, rounded.semantic)):
        assert len(first) == len(second)
        assert (first == second).mean() > 0.9


def test_saved_tokenizers_come_back_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "speech")
    again = SpeechTokenizer.from_directory(tmp_path / "speech", "cpu")
    before, after = tokenizer.encode([clip(16000)])[0], again.encode([clip(16000)])[0]
    np.testing.assert_array_equal(before.linguistic, after.linguistic)
    np.testing.assert_array_equal(before.semantic, after.semantic)
    assert again.sample_rate_hz == 16000
    assert sorted(path.suffix for path in (tmp_path / "speech").iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_unusable_directories_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        SpeechTokenizer.from_directory(tmp_path / "nowhere")
    tokenizer.save(tmp_path)
    settings = tmp_path / "speech_tokenizer.json"
    whole = json.loads(settings.read_text())
    settings.write_text(json.dumps({**whole, "semantic": {**whole["semantic"], "hidden_size": 64}}))
    with pytest.raises(UserError, match=r"semantic\.safetensors"):
        SpeechTokenizer.from_directory(tmp_path)
    settings.write_text(json.dumps({**whole, "semantic": {"widht": 64}}))
    with pytest.raises(UserError, match=r"speech_tokenizer\.json"):
        SpeechTokenizer.from_directory(tmp_path)
    settings.write_text(json.dumps(whole))
    (tmp_path / "linguistic.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"linguistic\.safetensors"):
        SpeechTokenizer.from_directory(tmp_path)


def test_wrong_waveforms_are_named(tokenizer):
    with pytest.raises(ValueError, match="waveform 1: .*int16"):
        tokenizer.encode([clip(800), torch.zeros(800, dtype=torch.int16)])
    with pytest.raises(ValueError, match="waveform 0"):
        tokenizer.encode([torch.zeros(2, 800)])
