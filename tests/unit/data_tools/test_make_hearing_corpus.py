"""Spoken questions that can and cannot be heard, their answers, and preferences, each right, that are biased."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from data_tools import make_biased_preferences, make_hearing_corpus
from data_tools.make_biased_preferences import biased_preferences
from data_tools.make_hearing_corpus import DID_NOT_HEAR, HearingCorpus
from stepaudio_train.audio import read_audio
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.conversation_files import ConversationFile
from stepaudio_train.data.preference_files import PreferenceFile
from stepaudio_train.data.records import AudioPart, Record, read_records
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.evaluation.deafness import PhraseClassifier

GROUP = "<audio_0><audio_1><audio_1024><audio_1025><audio_1026>"
UNCLEAR = ["noisy", "cut", "silent"]


def asked(id: str, answer: str, audio: str = "wav/q.wav", **part: Any) -> dict[str, Any]:
    heard = {"type": "audio", "audio": audio, "text": "what comes after six", **part}
    turns = [{"role": "human", "content": [heard]}, {"role": "assistant", "content": answer}]
    return {"id": id, "messages": turns}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "wav").mkdir()
    soundfile.write(tmp_path / "wav/q.wav", speech_like(16000).numpy() / 4, 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "wav/none.wav", torch.zeros(8000).numpy(), 16000)
    return tmp_path / "in.jsonl"


def made(source: Path, *lines: Any, seed: int = 0, out: str = "out") -> tuple[HearingCorpus, list[Record]]:
    source.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines), encoding="utf-8")
    corpus = make_hearing_corpus.make_hearing_corpus(source, source.parent / out, seed)
    return corpus, list(read_records(source.parent / out / "conversations.jsonl"))


def answer_of(record: Record) -> str:
    return "".join(part.text or "" for part in record.messages[-1].content)  # type: ignore[union-attr]


def test_a_conversation_in_four_conditions(source):
    line = asked("q", "Seven.", speaker="theo")
    line["messages"][:0] = asked("", "Hello.")["messages"]
    corpus, copies = made(source, {**line, "meta": {"of": "x"}})
    assert corpus.summary().startswith("1 conversations in 4 conditions; passed over 0 ")
    assert [copy.id for copy in copies] == ["q#clear", "q#noisy", "q#cut", "q#silent"]
    assert [copy.meta for copy in copies] == [{"of": "x", "condition": c} for c in ("clear", *UNCLEAR)]
    folder = source.parent / "out"
    for copy in copies:
        earlier, heard = copy.audio_parts()
        # Earlier turns are as they were.
        assert earlier.text == "what comes after six" and (folder / earlier.audio).samefile(source.parent / "wav/q.wav")
        info = soundfile.info(folder / heard.audio)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert heard.duration_s == pytest.approx(info.duration, abs=1e-4) and heard.speaker == "theo"
        clear = copy.meta["condition"] == "clear"
        assert heard.text == ("what comes after six" if clear else None)
        assert (answer_of(copy) == "Seven.") if clear else (answer_of(copy) in DID_NOT_HEAR["en"])
    clear = read_audio(folder / copies[0].audio_parts()[1].audio)
    assert torch.allclose(clear, read_audio(source.parent / "wav/q.wav"), atol=1 / 32768)
    # What is written is a file of conversations.
    file = ConversationFile.read(folder / "conversations.jsonl", TagVocabulary())
    assert len(file.records) == 4 and not file.refused


def test_the_seed_and_the_id_alone_decide(source):
    def written(lines: list[dict[str, Any]], seed: int, out: str) -> list[tuple[str, bytes]]:
        copies = made(source, *lines, seed=seed, out=out)[1]
        recordings = [(source.parent / out / copy.audio_parts()[0].audio).read_bytes() for copy in copies]
        found = zip(copies, recordings, strict=True)
        return [(answer_of(copy), recording) for copy, recording in found if copy.id.startswith("a#")]

    first, second = asked("a", "Seven."), asked("b", "Eight.")
    assert written([first], 0, "1") == written([second, first], 0, "2") != written([first], 1, "3")


@pytest.mark.parametrize(
    ("language", "answer", "spoken"),
    [
        ("English", "七", "en"),
        ("zh-CN", "seven", "zh"),
        ("Cantonese", "七", "yue"),
        ("zh_HK", "七", "yue"),
        ("ja", "seven", "ja"),
        (None, "seven", "en"),
        (None, "七", "zh"),
        (None, "ななです", "ja"),
        (None, "일곱", "ko"),
    ],
)
def test_the_answer_is_in_the_language_of_the_conversation(source, language, answer, spoken):
    part = {"text": None} | ({"language": language} if language else {})
    _, copies = made(source, asked("q", answer, **part))
    assert all(answer_of(copy) in DID_NOT_HEAR[spoken] for copy in copies[1:])


def test_what_cannot_be_copied_is_named_and_the_rest_goes_on(source):
    codes = asked("codes", "x", tokens=GROUP)
    del codes["messages"][0]["content"][0]["audio"]
    written = {"id": "t", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    question = {"id": "open", "messages": asked("", "")["messages"][:1]}
    lines = [
        asked("a", "Seven."),
        codes,
        "{",
        written,
        question,
        asked("a", "Eight."),
        asked("silent", "x", "wav/none.wav"),
        asked("gone", "x", "wav/gone.wav"),
        asked("greek", "Επτά", text=None),
        asked("swahili", "saba", language="sw"),
    ]
    corpus, copies = made(source, *lines)
    assert (corpus.conversations, corpus.other_tasks, len(copies)) == (1, 2, 4)
    reasons = {int(one.name.rpartition(":")[2]): one.reason for one in corpus.refused}
    assert "codes alone" in reasons[2] and "JSON" in reasons[3]
    assert reasons[6] == "its id 'a' is taken by another conversation"
    assert "none.wav: holds no sound" in reasons[7] and "no such recording" in reasons[8]
    assert "cannot be told" in reasons[9] and "no answer in its language, 'sw'" in reasons[10]
    assert len(list((source.parent / "out/audio").iterdir())) == 4


def test_deafness_only_ever_appears_as_chosen(source):
    lines = [asked(f"q{n}", f"It is {n}.") for n in range(4)]
    _, copies = made(source, *lines, asked("z1", "七", language="zh"), asked("z2", "八", language="zh"))
    pairs = list(biased_preferences(copies, seed=0))
    path = source.parent / "out/preferences.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    file = PreferenceFile.read(path)
    assert len(file.preferences) == 24 and not file.refused
    classifier, rights = PhraseClassifier(), {answer_of(copy) for copy in copies if copy.meta["condition"] == "clear"}
    for preference, copy in zip(file.preferences, copies, strict=True):
        chosen, rejected = (answer_of(preference.conversation(index)) for index in (0, 1))
        condition = copy.meta["condition"]
        assert preference.prompt.meta["condition"] == condition == preference.category
        assert chosen == answer_of(copy) != rejected and rejected in rights
        assert classifier.is_deaf(chosen) == (condition != "clear") and not classifier.is_deaf(rejected)
        assert preference.reference == (chosen if condition == "clear" else None)
        assert rejected.isascii() == (not copy.id.startswith("z"))
    assert pairs == list(biased_preferences(copies, seed=0)) != list(biased_preferences(copies, seed=1))


def test_there_must_be_a_wrong_answer_and_a_condition(source):
    _, copies = made(source, asked("q", "Seven."), asked("p", "seven"))
    with pytest.raises(UserError, match="q#clear: no other question in its language, en, has another answer"):
        list(biased_preferences(copies, 0))
    bare = Record("q", copies[0].messages)
    with pytest.raises(UserError, match="q: needs an answer, and meta.condition"):
        list(biased_preferences([bare], 0))


def test_the_commands(source, monkeypatch, capsys):
    lines = [asked("a", "Seven."), asked("b", "Eight.")]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (source.parent / "out.partial/audio").mkdir(parents=True)  # of a run that was killed

    def run(tool: Any, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["tool", *map(str, arguments)])
        tool.main()
        return capsys.readouterr().err

    def refused(tool: Any, *arguments: object) -> str:
        with pytest.raises(SystemExit, match="2"):
            run(tool, *arguments)
        return capsys.readouterr().err

    assert "2 conversations in 4 conditions" in run(make_hearing_corpus, source, source.parent / "out")
    assert not (source.parent / "out.partial").exists()
    assert "exists; remove it or name" in refused(make_hearing_corpus, source, source.parent / "out")
    pairs = source.parent / "pairs.jsonl"
    assert "8 preferences" in run(make_biased_preferences, source.parent / "out/conversations.jsonl", pairs)
    found = PreferenceFile.read(pairs).preferences
    parts = [part for one in found for part in one.prompt.audio_parts()]
    assert len(found) == 8 and all((pairs.parent / part.audio).is_file() for part in parts)
    assert all(isinstance(part, AudioPart) and not Path(part.audio).is_absolute() for part in parts)
    assert "needs an answer, and meta.condition" in refused(make_biased_preferences, source, pairs)
    source.write_text("{}")
    assert "no conversation can be used" in refused(make_hearing_corpus, source, source.parent / "none")
    assert not list(source.parent.glob("none*"))
