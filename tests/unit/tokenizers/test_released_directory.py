import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from stepaudio_train.audio.features import log_mel, normalise_log_mel
from stepaudio_train.config.tokenizer import SemanticConfig
from stepaudio_train.testing.small_tokenizers import LINGUISTIC, small_speech_tokenizer
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.released import is_released, read_released, write_released
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer, TokenizerError

FUNASR = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"


SMALL = SemanticConfig(num_mel_bins=16, hidden_size=24, num_heads=3, num_blocks=2)


def parts(**linguistic: int) -> tuple[LinguisticTokenizer, SemanticTokenizer]:
    made = small_speech_tokenizer(replace(LINGUISTIC, **linguistic), SMALL)
    return made.linguistic, made.semantic


def noise(num_samples: int) -> torch.Tensor:
    return 0.2 * torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))


def test_a_written_directory_is_read_back_to_the_bit(tmp_path):
    linguistic, semantic = parts()
    write_released(linguistic, semantic, tmp_path / "Tokenizer")
    assert is_released(tmp_path / "Tokenizer")
    for before, after in zip((linguistic, semantic), read_released(tmp_path / "Tokenizer"), strict=True):
        assert after.config == before.config
        for name, tensor in before.state_dict().items():
            assert torch.equal(tensor, after.state_dict()[name]), name
    clips = [noise(20000), noise(480)]
    loaded = SpeechTokenizer.from_directory(tmp_path / "Tokenizer", "cpu").encode(clips)
    for one, other in zip(SpeechTokenizer(linguistic, semantic, "cpu").encode(clips), loaded, strict=True):
        np.testing.assert_array_equal(one.linguistic, other.linguistic)
        np.testing.assert_array_equal(one.semantic, other.semantic)


def test_the_files_are_those_that_the_released_code_opens(tmp_path):
    linguistic, semantic = parts()
    write_released(linguistic, semantic, tmp_path / "Tokenizer")
    folder = tmp_path / "Tokenizer"
    centroids = np.load(folder / "linguistic_tokenizer.npy", allow_pickle=False)
    assert (centroids.shape, centroids.dtype) == ((50, 32), np.float32)
    metas = json.loads((folder / FUNASR / "configuration.json").read_text())["file_path_metas"]
    named = [metas["init_param"], metas["config"], *metas["tokenizer_conf"].values(), *metas["frontend_conf"].values()]
    assert all((folder / FUNASR / name).is_file() for name in named)
    settings = yaml.safe_load((folder / FUNASR / "config.yaml").read_text())
    assert settings["frontend_conf"]["dither"] == 0.0
    weights = torch.load(folder / FUNASR / "model.pt", weights_only=True)
    assert {name.split(".")[0] for name in weights} == {"encoder"}
    lines = (folder / FUNASR / "am.mvn").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("<AddShift>"))
    # FunASR's reader takes the words between the third and the last of the next line.
    shift = np.array(lines[at + 1].split()[3:-1], dtype=np.float32)
    np.testing.assert_array_equal(shift, linguistic.cmvn_shift.numpy())


@pytest.mark.parametrize("num_samples", [480, 16000, 16160, 100000])
def test_onnx_runtime_gives_the_same_ids(tmp_path, num_samples):
    linguistic, semantic = parts()
    write_released(linguistic, semantic, tmp_path / "Tokenizer")
    session = onnxruntime.InferenceSession(str(tmp_path / "Tokenizer" / "speech_tokenizer_v1.onnx"))
    feats, length = session.get_inputs()
    assert (feats.type, length.type) == ("tensor(float)", "tensor(int32)")
    mel, num_frames = log_mel(noise(num_samples)[None], torch.tensor([num_samples]), 16)
    mel = normalise_log_mel(mel, num_frames).transpose(1, 2).numpy()
    # More frames than the length says, as in a padded batch, change nothing.
    padded = np.pad(mel, ((0, 0), (0, 0), (0, 5)), constant_values=1.0)
    wanted = semantic(noise(num_samples)[None], torch.tensor([num_samples]))[0][0].tolist()
    for given in (mel, padded):
        (found,) = session.run(None, {feats.name: given, length.name: num_frames.int().numpy()})
        assert found.flatten().tolist() == wanted


def test_what_the_tokenizers_do_not_hold_is_taken_over(tmp_path):
    linguistic, semantic = parts()
    write_released(linguistic, semantic, tmp_path / "first")
    model = tmp_path / "first" / FUNASR / "model.pt"
    torch.save(torch.load(model, weights_only=True) | {"decoder.output.weight": torch.ones(3)}, model)
    (tmp_path / "first" / FUNASR / "tokens.json").write_text('["a", "b", "c"]')
    linguistic.encoder.after_norm.weight.data.fill_(2.0)
    write_released(linguistic, semantic, tmp_path / "second", source=tmp_path / "first")
    weights = torch.load(tmp_path / "second" / FUNASR / "model.pt", weights_only=True)
    assert weights["decoder.output.weight"].tolist() == [1, 1, 1]
    assert weights["encoder.after_norm.weight"].tolist() == [2.0] * 32
    assert json.loads((tmp_path / "second" / FUNASR / "tokens.json").read_text()) == ["a", "b", "c"]


def test_refusals_name_the_file_and_the_key(tmp_path):
    linguistic, semantic = parts()
    folder = tmp_path / "Tokenizer"
    with pytest.raises(TokenizerError, match="chunk_frames=8"):
        write_released(parts(chunk_frames=8)[0], semantic, folder)
    short = small_speech_tokenizer(semantic=replace(SMALL, piece_tokens=6)).semantic
    with pytest.raises(TokenizerError, match="piece_tokens=6"):
        write_released(linguistic, short, folder)
    assert not list(tmp_path.iterdir())
    write_released(linguistic, semantic, folder)
    with pytest.raises(TokenizerError, match="exists already"):
        write_released(linguistic, semantic, folder)
    config = folder / FUNASR / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["encoder_conf"]["input_layer"] = "pe"
    whole = config.read_text()
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(TokenizerError, match=r"config\.yaml: encoder_conf\.input_layer is 'pe'"):
        read_released(folder)
    config.write_text(whole.replace("num_blocks: 2", "num_blocks: 3"))
    with pytest.raises(TokenizerError, match=r"model\.pt: does not fit"):
        read_released(folder)
    config.write_text(whole)
    mvn = folder / FUNASR / "am.mvn"
    mvn.write_text(mvn.read_text().replace("<Rescale>", "<Else>"))
    with pytest.raises(TokenizerError, match=r"am\.mvn"):
        read_released(folder)
    (folder / "speech_tokenizer_v1.onnx").write_bytes(b"\x00\x01no model")
    mvn.write_text(mvn.read_text().replace("<Else>", "<Rescale>"))
    with pytest.raises(TokenizerError, match=r"speech_tokenizer_v1\.onnx"):
        read_released(folder)
    (folder / "linguistic_tokenizer.npy").write_bytes(b"none")
    with pytest.raises(TokenizerError, match=r"linguistic_tokenizer\.npy"):
        SpeechTokenizer.from_directory(folder)
