"""The espeak-ng corpus: deterministic, aligned, and without a recording that is there twice."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import soundfile

from data_tools.make_corpus import ENGLISH, MANDARIN
from stepaudio_train.data.sources import find_recordings

ROOT = Path(__file__).resolve().parents[3]


def make(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own, as users run it: espeak's state is global and outlives a corpus.
    command = [sys.executable, "-m", "data_tools.make_corpus", str(directory), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "corpus"
    made = make(directory, "--minutes", "1", "--seed", "3")
    assert made.returncode == 0, made.stderr
    return directory


def lines(corpus: Path) -> list[dict]:
    return [json.loads(line) for line in (corpus / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def test_length_languages_and_vocabulary(corpus):
    rows = lines(corpus)
    assert 60 <= sum(row["duration_s"] for row in rows) < 65
    assert 0.8 < 60 / len(rows) < 1.8
    words = Counter(w for r in rows for w in (r["text"] if r["language"] == "zh" else r["text"].split()))
    assert set(words) <= {*ENGLISH, *MANDARIN}
    assert {row["language"] for row in rows} == {"en", "zh"}
    assert all(1 <= len(row["spans"]) <= 4 for row in rows)


def test_no_two_recordings_are_alike(corpus):
    rows = lines(corpus)
    audio = {soundfile.read(corpus / row["audio"])[0].tobytes() for row in rows}
    assert len(audio) == len(rows)


def test_spans_tile_the_speech_and_hold_the_words(corpus):
    for row in lines(corpus):
        info = soundfile.info(corpus / row["audio"])
        assert info.duration == pytest.approx(row["duration_s"], abs=1e-3)
        spans = row["spans"]
        assert "".join(s["text"] for s in spans) == row["text"].replace(" ", "")
        assert all(a["end_s"] == b["start_s"] for a, b in pairwise(spans))
        assert spans[0]["start_s"] > 0
        assert all(span["end_s"] - span["start_s"] > 0.05 for span in spans)
        assert spans[-1]["end_s"] < row["duration_s"]


def test_the_seed_decides_everything(corpus, tmp_path):
    assert make(tmp_path / "again", "--minutes", "1", "--seed", "3").returncode == 0
    assert digests(tmp_path / "again") == digests(corpus)
    assert make(tmp_path / "other", "--minutes", "0.1", "--seed", "4").returncode == 0
    assert lines(tmp_path / "other")[0]["text"] != lines(corpus)[0]["text"]


def test_prepare_takes_the_manifest(corpus):
    found = find_recordings(corpus / "manifest.jsonl")
    assert not found.refusals
    assert len(found.records) == len(lines(corpus))
    assert all(record.audio_parts()[0].speaker for record in found.records)


def test_an_existing_folder_is_left_alone(tmp_path):
    refused = make(tmp_path, "--minutes", "0.1")
    assert refused.returncode == 2
    assert "exists" in refused.stderr


def test_what_an_interrupted_run_left_is_made_anew(tmp_path):
    partial = tmp_path / "corpus.partial"
    (partial / "wav").mkdir(parents=True)
    (partial / "manifest.jsonl").touch()
    assert make(tmp_path / "corpus", "--minutes", "0.05").returncode == 0
    assert not partial.exists()
