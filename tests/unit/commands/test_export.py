import pytest
import torch

from stepaudio_train.cli import main
from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    linguistic = LinguisticTokenizer(LinguisticConfig(hidden_size=32, ffn_size=48, num_blocks=2))
    semantic = SemanticTokenizer(SemanticConfig(hidden_size=32, num_blocks=2))
    linguistic.centroids.normal_()
    semantic.quantizer.codes.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("export") / "trained"
    SpeechTokenizer(linguistic, semantic, "cpu").save(folder)
    return folder


def test_a_tokenizer_is_exported_and_compared(trained, tmp_path, capsys):
    assert main(["export", "tokenizer", str(trained), str(tmp_path / "exported")]) == 0
    shown = capsys.readouterr().out
    assert "read again: ids equal" in shown and "ONNX Runtime: ids equal" in shown
    assert (tmp_path / "exported" / "speech_tokenizer_v1.onnx").is_file()
    # An exported directory is as good a source as any.
    assert main(["export", "tokenizer", str(tmp_path / "exported"), str(tmp_path / "again")]) == 0


def test_unusable_sources_are_named(trained, tmp_path, capsys):
    assert main(["export", "tokenizer", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "none" in capsys.readouterr().err
    released = ["--released", str(trained)]
    assert main(["export", "tokenizer", str(trained), str(tmp_path / "out"), *released]) == 2
    assert "is no released" in capsys.readouterr().err
