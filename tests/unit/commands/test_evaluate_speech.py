"""`stepaudio evaluate speech`: lines in, scores out, references beside them, in one process or several."""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import fields
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from stepaudio_train.cli import build_parser, main
from stepaudio_train.commands import evaluate_speech as module
from stepaudio_train.commands.evaluate_speech import SpeechOptions, evaluate_speech, speech_summary
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.judges import JudgeOptions
from stepaudio_train.evaluation.speech_judges import Judges

NO_JUDGES = JudgeOptions("none", "none", "none")


class Listener:
    """Hears `low` or `high`, and every voice as one."""

    def transcribe(self, waveform: Tensor) -> str:
        crossings = ((waveform[1:] > 0) != (waveform[:-1] > 0)).sum()
        return "low" if crossings < 250 * 2 * len(waveform) / 16000 else "high"

    def embed(self, waveform: Tensor) -> Tensor:
        return torch.ones(2)


@pytest.fixture
def asked(monkeypatch) -> list[JudgeOptions]:
    """What judges were built for."""
    options: list[JudgeOptions] = []

    def build(one: JudgeOptions) -> Judges:
        options.append(one)
        return Judges(Listener(), Listener())

    monkeypatch.setattr(module, "build_judges", build)
    return options


@pytest.fixture(autouse=True)
def new_judges() -> None:
    module._judges.cache_clear()


def tone(path: Path, f0_hz: float, duration_s: float = 0.5) -> None:
    path.parent.mkdir(exist_ok=True)
    time_s = torch.arange(round(duration_s * 16000)) / 16000
    soundfile.write(path, (0.3 * torch.sin(2 * torch.pi * f0_hz * time_s)).numpy(), 16000)


def write_lines(folder: Path, *lines: dict | str) -> Path:
    for f0_hz in (200, 212, 400):
        tone(folder / "sounds" / f"{f0_hz}.wav", f0_hz)
    path = folder / "lines.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_references_are_judged_beside_and_bad_lines_are_refused_by_number(tmp_path: Path, asked):
    low, other_low, high = (f"sounds/{f0_hz}.wav" for f0_hz in (200, 212, 400))
    file = write_lines(
        tmp_path,
        {"id": "a", "text": "low", "speech": other_low, "reference": low},
        {"id": "b", "text": "low", "speech": high, "reference": low, "voice": other_low},
        "",
        {"id": "c", "text": "low", "speech": high},
        "no JSON",
        {"id": "d", "text": "low", "sound": high},
        {"id": "a", "text": "low", "speech": high},
        {"id": "e", "text": "low", "speech": "sounds/none.wav"},
    )
    result = evaluate_speech(SpeechOptions(file, tmp_path / "out", references=True), JudgeOptions(words=("low", "up")))
    assert result == json.loads((tmp_path / "out" / "speech.json").read_text())
    speech, reference = result["speech"], result["reference"]
    assert [line["heard"] for line in speech["utterances"]] == ["low", "high", "high"]
    assert speech["wer"] == pytest.approx(200 / 3) and reference["wer"] == 0
    assert [line["id"] for line in reference["utterances"]] == ["a", "b"]
    # A reference is compared with another recording of the voice, never with itself.
    assert [line["speaker_similarity"] for line in reference["utterances"]] == [None, pytest.approx(1)]
    assert "num_prosody" not in reference and speech["num_prosody"] == 2
    # 212 Hz is 100.9 cents over 200 Hz.
    assert speech["utterances"][0]["prosody"]["squared_cents"] == pytest.approx(
        speech["utterances"][0]["prosody"]["num_voiced"] * 100.9**2, rel=0.1
    )
    reasons = {line["name"]: line["reason"] for line in speech["refused"]}
    assert reasons.keys() == {*(f"{file}:{number}" for number in (5, 6, 7)), "e"}
    assert "sound: unknown field" in reasons[f"{file}:6"] and "none.wav" in reasons["e"]
    assert asked == [JudgeOptions(words=("low", "up"))]
    shown = speech_summary(result).splitlines()
    assert shown[0].split() == ["speech", "reference"]
    assert next(line for line in shown if line.startswith("words")).split()[-2:] == ["66.7", "0.0"]
    assert next(line for line in shown if line.startswith("pitch")).split()[-1] == "-"
    assert sum(line.startswith("left out of speech: ") for line in shown) == 4


def test_words_may_be_files_of_words(tmp_path: Path, asked):
    file = write_lines(tmp_path, {"id": "a", "text": "low", "speech": "sounds/200.wav"})
    (tmp_path / "words.txt").write_text("low high\nup\n")
    options = SpeechOptions(file, tmp_path / "out")
    result = evaluate_speech(options, JudgeOptions(words=("stop", str(tmp_path / "words.txt"))))
    assert asked[0].words == ("stop", "low", "high", "up")
    assert result.keys() == {"speech"}


def test_several_processes_say_what_one_says(tmp_path: Path):
    rows = [{"id": str(n), "text": "x", "speech": f"sounds/{n}.wav", "reference": "sounds/200.wav"} for n in range(9)]
    file = write_lines(tmp_path, *rows)
    for number in range(8):
        tone(tmp_path / "sounds" / f"{number}.wav", 180 + 10 * number, 0.3 + 0.05 * number)
    one, two = (evaluate_speech(SpeechOptions(file, tmp_path / str(n), True, n), NO_JUDGES) for n in (1, 2))
    assert one == two
    assert [line["id"] for line in two["speech"]["utterances"]] == [str(number) for number in range(8)]
    assert two["speech"]["num_refused"] == 1 and two["reference"]["num_scored"] == 9


def test_what_cannot_be_judged_at_all_is_told(tmp_path: Path, capsys, monkeypatch):
    file = write_lines(tmp_path, {"id": "a"})
    with pytest.raises(UserError, match=r"lines\.jsonl: holds no line that can be used: .*lines\.jsonl:1: .*required"):
        evaluate_speech(SpeechOptions(file, tmp_path / "out"), NO_JUDGES)
    file = write_lines(tmp_path, {"id": "a", "text": "low", "speech": "sounds/200.wav"})
    with pytest.raises(UserError, match="--num-workers 0: must be at least 1"):
        evaluate_speech(SpeechOptions(file, tmp_path / "out", num_workers=0), NO_JUDGES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    judges = ["--recogniser", "none", "--speaker", "none"]
    assert main(["evaluate", "speech", str(file), "--output", str(tmp_path / "out"), *judges]) == 2
    assert "pip install 'stepaudio-train[judges]', or --quality none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["evaluate", "speech", str(file), "--output", str(tmp_path / "out"), *judges, "--quality", "none"]) == 0
    assert "clips judged" in capsys.readouterr().out


def test_options_are_the_dataclasses_and_so_are_their_defaults():
    commands = next(action.choices for action in build_parser()._actions if action.metavar == "COMMAND")
    actions = next(action.choices for action in commands["evaluate"]._actions if action.metavar == "ACTION")
    parsed = {action.dest: action for action in actions["speech"]._actions if action.dest != "help"}
    known = {field.name: field for options in (SpeechOptions, JudgeOptions) for field in fields(options)}
    assert parsed.keys() == known.keys()
    for name, action in parsed.items():
        assert action.default is argparse.SUPPRESS
        if "(default " in (action.help or ""):
            assert action.help.split("(default ")[1].rstrip(")") == known[name].default
