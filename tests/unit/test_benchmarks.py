"""The benchmarks run and tell figures; that they are good figures is no matter of tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepaudio_train.testing.reference_packages import has_reference

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


@pytest.mark.skipif(not has_reference("funasr"), reason="needs funasr; type: make setup")
def test_tokenization(tmp_path: Path):
    rows = measure(tmp_path, "tokenization.py", "--size", "small", "--audio-s", "8")
    assert len(rows) == 6
    assert all(row["times real time"] > 0 for row in rows)
    # Every way computes the same ids from the same weights; bf16 may round some to others.
    streams = json.loads((tmp_path / "results.stream.json").read_text())["rows"]
    assert [row["precision"] for row in streams] == ["fp32", "bf16"]
    assert all(0 < row["ms a chunk, median"] <= row["95th percentile"] for row in streams)
    for row in rows[:4]:
        assert row["equal linguistic ids %"] > 99.5 and row["equal semantic ids %"] > 99.5


@pytest.mark.slow
def test_training_computes_what_the_baseline_does(tmp_path: Path):
    rows = measure(tmp_path, "training.py", "--steps", "6", "--only", "Trainer", "local", "training.sequence_length=64")
    assert len(rows) == 3  # the program itself compares the losses
