import json

import numpy as np
import pytest
import torch

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import PIECE_SAMPLES, SpeechTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> SpeechTokenizer:
    torch.manual_seed(0)
    linguistic = LinguisticTokenizer(LinguisticConfig(hidden_size=32, ffn_size=48, num_blocks=2, codebook_size=50))
    semantic = SemanticTokenizer(SemanticConfig(hidden_size=32, num_blocks=2, codebook_size=60))
    linguistic.cmvn_shift.fill_(-8.0)
    linguistic.cmvn_scale.fill_(0.3)
    linguistic.centroids.normal_()
    semantic.quantizer.codes.normal_(std=0.2)
    return SpeechTokenizer(linguistic, semantic, "cpu")


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
        frames = 1 + (len(waveform) - 400) // 160
        assert len(alone.linguistic) == -(-frames // 6)
        assert len(alone.semantic) == ((len(waveform) // 160 + 1) // 2 + 1) // 2


def test_level_does_not_matter(tokenizer):
    loud, quiet = tokenizer.encode([clip(8000) * 0.9, clip(8000) * 0.09])
    np.testing.assert_array_equal(loud.linguistic, quiet.linguistic)
    np.testing.assert_array_equal(loud.semantic, quiet.semantic)


@pytest.mark.parametrize(("samples", "linguistic", "semantic"), [(0, 0, 0), (399, 0, 0), (400, 1, 0), (480, 1, 1)])
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
