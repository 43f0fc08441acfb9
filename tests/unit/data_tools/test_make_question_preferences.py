"""Right sentences are chosen over the bare word, and over wrong sentences of the same language."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools import make_question_preferences
from data_tools.make_instruction_corpus import QUESTION_FILES
from data_tools.make_question_preferences import WORD, WRONG, question_preferences
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.preference_files import PreferenceFile
from stepaudio_train.data.prompts import question_record
from stepaudio_train.data.records import AudioPart, Record, record_to_json


def asked(number: int, answer: str) -> Record:
    return question_record(f"q{number}", AudioPart(f"wav/{number}.wav", text="what is it"), answer)


def test_sentences_are_chosen_over_words_and_over_what_is_wrong():
    pairs = list(question_preferences([asked(n, "it is five") for n in range(120)], seed=0))
    assert [pair["category"] for pair in pairs] == [WRONG, WORD, WORD, WORD, WORD, WORD] * 20
    rejected = [pair["rejected"]["content"][0]["text"] for pair in pairs]
    wrong = rejected[::6]
    assert {text for n, text in enumerate(rejected) if n % 6} == {"five"}
    assert len(set(wrong)) > 5 and "it is five" not in wrong and all(text.startswith("it is ") for text in wrong)
    chosen = {pair["chosen"]["content"][0]["text"] for pair in pairs}
    assert chosen == {pair["reference"] for pair in pairs} == {"it is five"}
    assert pairs != list(question_preferences([asked(n, "it is five") for n in range(120)], seed=1))
    (chinese,) = question_preferences([asked(0, "是五")], seed=0)
    assert chinese["rejected"]["content"][0]["text"][0] == "是"
    with pytest.raises(UserError, match="q7: does not end with a sentence of .*'maybe'"):
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
        (tmp_path / "made" / f"{name}.jsonl").write_text(json.dumps(record_to_json(asked(1, "it is two"))) + "\n")
    assert run().count("1 preferences in ") == 2
    for name in ("preferences", "held_out_preferences"):
        file = PreferenceFile.read(tmp_path / "out" / f"{name}.jsonl")
        (part,) = file.preferences[0].prompt.audio_parts()
        assert not file.refused and (tmp_path / "out" / str(part.audio)).is_file()
