import pytest

from stepaudio_train.cli import main
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "trained"
    small_speech_tokenizer().save(folder)
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
