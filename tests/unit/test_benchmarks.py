"""The benchmarks run and tell figures; that they are good figures is no matter of tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def measure(tmp_path: Path, program: str, *arguments: str) -> list[dict]:
    results = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / program, *arguments, "--json", str(results)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(results.read_text())["rows"]


def test_loader(tmp_path: Path):
    rows = measure(tmp_path, "loader.py", "--batches", "2", "--rows", "2")
    assert all(row["tokens/s"] > 0 and 99 <= row["fill %"] <= 100 for row in rows)


def test_tokenization(tmp_path: Path):
    tokenizer = SpeechTokenizer(LinguisticTokenizer(LinguisticConfig()), SemanticTokenizer(SemanticConfig()))
    tokenizer.save(tmp_path / "speech")
    shape = ("--audio-s", "1", "--clip-s", "0.5", "--batch-s", "1")
    rows = measure(tmp_path, "tokenization.py", "--tokenizer", str(tmp_path / "speech"), *shape)
    assert [row["clips a batch"] for row in rows] == [1, 2]
    assert all(row["times real time"] > 0 for row in rows)


@pytest.mark.slow
def test_training_computes_what_the_baseline_does(tmp_path: Path):
    rows = measure(tmp_path, "training.py", "--steps", "6", "--only", "Trainer", "local", "training.sequence_length=64")
    assert len(rows) == 3  # the program itself compares the losses
