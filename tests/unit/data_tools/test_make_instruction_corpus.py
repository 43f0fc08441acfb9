"""Conversations of synthesised speech: their tags are true, and the splits share nothing that matters."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import soundfile
import torch

from data_tools.make_instruction_corpus import (
    BEAT_S,
    LANGUAGES,
    QUESTION_FILES,
    VOICES,
    control_grid,
    make_instruction_corpus,
    questions,
)
from stepaudio_train.audio.pitch import yin
from stepaudio_train.data.chat import task_of, turns_of
from stepaudio_train.data.conversation_files import ConversationFile
from stepaudio_train.data.records import Record
from stepaudio_train.data.sources import find_recordings
from stepaudio_train.data.tags import TagVocabulary

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "instructions"
    counts = make_instruction_corpus(folder, scale=0.05, seed=3)
    assert counts["train"] > 300 and counts["test"] > 300
    return folder


@pytest.fixture(scope="module")
def splits(corpus) -> dict[str, list[Record]]:
    found = {}
    for split in ("train", "validation", "test", *QUESTION_FILES):
        file = ConversationFile.read(corpus / f"{split}.jsonl", TagVocabulary())
        assert not file.refused
        found[split] = [record for _, record in file.records]
    return found


def test_every_conversation_is_of_its_task(splits):
    records = [record for records in splits.values() for record in records]
    assert {record.task for record in records} == {"tts", "edit", "asr", "aqta", "tqta"}
    for record in records:
        assert turns_of(record) == record.messages and task_of(record) == record.task


def test_splits_share_no_recording_and_tagged_texts_are_held_out(splits):
    heard = {split: {p.audio for r in records for p in r.audio_parts()} for split, records in splits.items()}
    assert sum(map(len, heard.values())) == len(set().union(*heard.values()))
    assert {name: len(splits[name]) for name in QUESTION_FILES} == {"questions": 60, "held_out_questions": 20}
    assert {record.task for name in QUESTION_FILES for record in splits[name]} == {"aqta"}
    answers = [record.messages[-1].content[0].text for name in QUESTION_FILES for record in splits[name]]
    assert all(answer.startswith(("it is ", "是")) for answer in answers)
    either = [r.messages[-1].content[0].text for r in splits["train"] if r.id.startswith("train_open")]
    assert 0.2 < sum(answer.startswith(("it is ", "是")) for answer in either) / len(either) < 0.8
    said = {split: {r.meta["text"] for r in records if r.task == "tts"} for split, records in splits.items()}
    assert not (said["train"] | said["validation"]) & said["test"]


def _pitch_hz(wave: np.ndarray, rate: int) -> float:
    f0_hz = yin(torch.from_numpy(wave), rate).f0_hz
    return float(f0_hz[f0_hz > 0].median())


def durations(corpus: Path, records: list[Record]) -> dict[str, dict[tuple[str, str], float]]:
    """(text, voice) -> tag -> seconds."""
    found: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for record in records:
        if record.task == "tts":
            tag = (record.meta["tags"] or ["none"])[0]
            audio = corpus / record.audio_parts()[-1].audio
            found[tag][record.meta["text"], record.meta["speaker"]] = soundfile.info(audio).duration
    return found


def test_faster_levels_are_shorter(corpus, splits):
    found = durations(corpus, splits["test"])
    order = [*(f"slow {level}" for level in (5, 4, 3, 2, 1)), "none", *(f"fast {level}" for level in (1, 2, 3, 4, 5))]
    texts = set(found["fast 5"])
    assert len(texts) > 8
    means = [mean(found[tag][text] for text in texts) for tag in order]
    assert means == sorted(means, reverse=True) and means[0] > 2 * means[-1]


def test_sung_words_follow_the_tune(corpus, splits):
    sung = [record for record in splits["test"] if record.meta.get("tags") == ["singing"]]
    assert sung
    assert len({tuple(record.meta["notes"][:3]) for record in sung}) == 2  # both tunes
    for record in sung:
        notes = record.meta["notes"]
        assert len(notes) >= 4
        wave, rate = soundfile.read(corpus / record.audio_parts()[-1].audio)
        pieces = np.array_split(wave[int(0.05 * rate) : -int(0.05 * rate)], len(notes))
        heard_hz = [_pitch_hz(piece, rate) for piece in pieces]
        # Words are not of one length, so that the parts blur a little.
        assert np.corrcoef(notes, np.log(heard_hz))[0, 1] > 0.6


def test_chanted_words_start_on_beats(corpus, splits):
    chanted = [record for record in splits["test"] if record.meta.get("tags") == ["RAP"]]
    before, after = [], []
    for record in chanted:
        wave, rate = soundfile.read(corpus / record.audio_parts()[-1].audio)
        loud = np.abs(wave) > 0.1 * np.abs(wave).max()
        beat, margin = BEAT_S * rate, int(0.06 * rate)
        # A word that lasts over a beat fills the next one, so not every beat has a start; every start has a beat.
        for start in np.arange(np.flatnonzero(loud)[0] + beat, np.flatnonzero(loud)[-1] - margin, beat).astype(int):
            before.append(loud[start - margin : start].mean())
            after.append(loud[start : start + margin].mean())
    assert len(after) > 20 and np.mean(after) > 1.3 * np.mean(before)


def test_languages_and_voices_are_all_there():
    grid = control_grid(np.random.default_rng(0))
    spoken = {language for _, language, _, asked in grid if asked is not None and asked.tag.kind == "language"}
    assert spoken == set(LANGUAGES) and {name for _, _, name, _ in grid} == set(VOICES)


def test_answers_are_right():
    facts = {(language, question): answer for language, question, answer in questions()}
    assert facts["en", "what comes after seven"] == "eight" and facts["en", "two plus five"] == "seven"
    assert facts["zh", "三加四等于几"] == "七" and facts["zh", "一前面是几"] == "零"
    assert facts["en", "opposite of up"] == "down"
    assert len(facts) == len(questions())  # no question has two answers


def test_the_manifest_is_of_the_training_split(corpus, splits):
    listed = {Path(r.audio_parts()[0].audio).name for r in find_recordings(corpus / "manifest.jsonl").records}
    train = {Path(part.audio).name for record in splits["train"] for part in record.audio_parts()}
    assert listed and listed < train
    assert "请回答音频中的问题。" in (corpus / "texts.txt").read_text(encoding="utf-8")


def test_the_same_seed_makes_the_same_corpus(tmp_path):
    command = [sys.executable, "-m", "data_tools.make_instruction_corpus"]
    for folder in ("one", "other"):
        subprocess.run([*command, str(tmp_path / folder), "--scale", "0.01", "--seed", "5"], check=True, cwd=ROOT)
    for name in ("train.jsonl", "test.jsonl", "manifest.jsonl", "wav/000000.wav"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
