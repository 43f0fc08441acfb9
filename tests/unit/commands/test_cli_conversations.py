"""`stepaudio data show` and `check`: what a model sees, and what is refused, by line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stepaudio_train.cli import main
from stepaudio_train.testing.token_data import write_text_tokenizer

GROUP = "<audio_0><audio_1><audio_1024><audio_1025><audio_1026>"


def line(*turns: tuple[str, object], **fields: object) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text_tokenizer(tmp_path / "text.model")
    soundfile.write(tmp_path / "short.wav", np.zeros(24000), 16000)  # 1.5 s: 12 groups
    soundfile.write(tmp_path / "long.wav", np.zeros(960000), 16000)  # a minute: 2,500 codes
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    return tmp_path


def recording(name: str) -> list[dict[str, str]]:
    return [{"type": "audio", "audio": name}]


def test_check_names_every_bad_line_and_counts_the_rest(folder, capsys):
    lines = [
        line(("human", recording("short.wav")), ("assistant", "one")),
        line(("human", recording("absent.wav")), ("assistant", "one")),
        line(("human", "(fats 2)one"), ("assistant", recording("short.wav"))),
        line(("assistant", "one"), ("human", "two")),
        line(("human", recording("long.wav")), ("assistant", "one")),
        line(("human", recording("broken.wav")), ("assistant", "one")),
        line(("human", "one"), ("assistant", "two"), task="asr"),
        line(("human", "(fast 2)one"), ("assistant", recording("short.wav"))),
        "{",
        line(("assistant", recording("short.wav"))),
    ]
    file = folder / "all.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    options = ["--text-tokenizer", str(folder / "text.model"), "--sequence-length", "300"]
    assert main(["data", "check", str(file), *options]) == 1
    told = capsys.readouterr().out.splitlines()
    reasons = {row.partition(": ")[0].rpartition(":")[2]: row for row in told[:-1]}
    assert list(reasons) == ["2", "3", "4", "5", "6", "7", "9", "10"]
    for number, reason in {
        "2": "no such recording",
        "3": "did you mean 'fast'",
        "4": "ends with a turn of human",
        "5": "training.sequence_length=25",
        "6": "cannot be read as audio",
        "7": "task asr: the last turn of human must hold audio",
        "9": "JSON",
        "10": "turn 1 is assistant",
    }.items():
        assert reason in reasons[number]
    assert "2 conversations (1 aqta, 1 tts), 8 refused" in told[-1]


def test_show_prints_ids_text_and_what_teaches(folder, capsys):
    file = folder / "some.jsonl"
    asked = [{"type": "audio", "tokens": GROUP * 3}, {"type": "text", "text": "what"}]
    file.write_text(
        "\n".join([line(("human", "x"), ("assistant", "y")), line(("human", asked), ("assistant", "one"), id="c2")])
    )
    options = ["--text-tokenizer", str(folder / "text.model"), "--first", "2"]
    assert main(["data", "show", str(file), *options]) == 0
    told = capsys.readouterr().out.replace("\n", "")
    assert "some.jsonl:2  c2  aqta" in told and "some.jsonl:1" not in told
    assert "... 15 audio tokenswhat<|EOT|><|BOT|> assistantone<|EOT|>" in told
    assert main(["data", "show", str(file), *options, "--ids"]) == 0
    told = capsys.readouterr().out.replace("\n", "")
    assert "1:'<s>'" in told and "3:'<|EOT|>'" in told and "'<audio_1024>'" in told


def test_own_tags_are_known_when_they_are_named(folder, capsys):
    file = folder / "own.jsonl"
    file.write_text(line(("human", "(whisper)one"), ("assistant", [{"type": "audio", "tokens": GROUP}])))
    options = ["data", "check", str(file), "--text-tokenizer", str(folder / "text.model")]
    assert main(options) == 2  # nothing is left
    assert "own_tags=[whisper]" in capsys.readouterr().err
    assert main([*options, "--own-tags", "whisper"]) == 0
