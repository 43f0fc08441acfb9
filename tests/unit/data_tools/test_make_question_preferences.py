"""Every pair is a right answer and a wrong one of the same language; half of the wrong ones are near misses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools import make_question_preferences
from data_tools.make_instruction_corpus import NUMBERS, QUESTION_FILES, questions
from data_tools.make_question_preferences import FAR, NEAR, question_preferences, wrong_answers
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.preference_files import PreferenceFile
from stepaudio_train.data.prompts import question_record
from stepaudio_train.data.records import AudioPart, Record, record_to_json


def asked(number: int, answer: str) -> Record:
    return question_record(f"q{number}", AudioPart(f"wav/{number}.wav", text="what is it"), answer)


def test_wrong_answers_are_wrong_and_of_the_language():
    english, chinese = wrong_answers("eight"), wrong_answers("零")
    assert english[0] == ["six", "seven", "nine"] and "eight" not in english[1] and {"zero", "left"} < set(english[1])
    assert chinese == (["一", "二"], list(NUMBERS["zh"][1:]))
    near, others = wrong_answers("right")
    assert near == ["left"] and "right" not in others and {"up", "three"} < set(others)
    assert wrong_answers("perhaps") == ([], [])
    assert all(wrong_answers(answer)[0] for _, _, answer in questions())


def test_near_misses_and_others_take_turns():
    pairs = list(question_preferences([asked(n, "five") for n in range(40)], seed=0))
    assert [pair["category"] for pair in pairs] == [NEAR, FAR] * 20
    rejected = [pair["rejected"]["content"][0]["text"] for pair in pairs]
    assert set(rejected[::2]) == {"three", "four", "six", "seven"} and len(set(rejected[1::2])) > 5
    assert {pair["chosen"]["content"][0]["text"] for pair in pairs} == {pair["reference"] for pair in pairs} == {"five"}
    assert pairs != list(question_preferences([asked(n, "five") for n in range(40)], seed=1))
    with pytest.raises(UserError, match="q7: does not end with an answer of .*'maybe'"):
        list(question_preferences([asked(7, "maybe")], seed=0))


def test_the_command_names_recordings_as_its_files_have_them(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "made/wav").mkdir(parents=True)
    (tmp_path / "made/wav/1.wav").touch()

    def run() -> str:
        monkeypatch.setattr("sys.argv", ["tool", str(tmp_path / "made"), str(tmp_path / "out")])
        make_question_preferences.main()
        return capsys.readouterr().err

    with pytest.raises(SystemExit, match="2"):
        run()
    assert "questions.jsonl" in capsys.readouterr().err
    for name in QUESTION_FILES:
        (tmp_path / "made" / f"{name}.jsonl").write_text(json.dumps(record_to_json(asked(1, "two"))) + "\n")
    assert run().count("1 preferences in ") == 2
    for name in ("preferences", "held_out_preferences"):
        file = PreferenceFile.read(tmp_path / "out" / f"{name}.jsonl")
        (part,) = file.preferences[0].prompt.audio_parts()
        assert not file.refused and (tmp_path / "out" / str(part.audio)).is_file()
