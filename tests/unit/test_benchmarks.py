"""The benchmarks run and tell figures; that they are good figures is no matter of tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepaudio_train.cli import main
from stepaudio_train.testing.reference_packages import has_reference

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def measure(tmp_path: Path, program: str, *arguments: str) -> list[dict]:
    return measured(tmp_path, [str(BENCHMARKS / program), *arguments])


def bench(tmp_path: Path, *arguments: str) -> list[dict]:
    return measured(tmp_path, ["-m", "stepaudio_train.cli", "bench", *arguments])


def measured(tmp_path: Path, arguments: list[str]) -> list[dict]:
    results = tmp_path / "results.json"
    command = [sys.executable, *arguments, "--json", str(results)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(results.read_text())["rows"]


WAYS = {
    "attention": ["ours", "SDPA, dense bias", "SDPA, causal alone", "Megatron-Core, no bias"],
    "head": ["ours", "exponentials computed again", "logits, cross entropy"],
    "step": ["ours: local", "ours: megatron", "transformers, padded", "transformers, packed", "Llama, padded"],
}


def test_ways_are_measured_in_turns(tmp_path: Path):
    options = ("--rounds", "1", "--device", "cpu")
    commands = [["bench", name, *options, "--json", str(tmp_path / f"{name}.json")] for name in WAYS]
    # One process for all three, since importing takes longest; and a shorter row than anyone would measure.
    program = (
        "from stepaudio_train.cli import main; from stepaudio_train.commands.bench import cases; "
        "cases._SIZES['small'] = cases._Size(('training.sequence_length=512',), apart=False); "
        f"assert [main(command) for command in {commands!r}] == [0, 0, 0]"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for name, ways in WAYS.items():
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert all(row["ms"] > 0 and row["GFLOP/s"] > 0 and row["of the products"] > 0 for row in rows)
        assert rows[0]["times ours"] == 1 and rows[-1]["what"] == "matrix products alone"
        assert all(any(row["what"].startswith(way) for row in rows) for way in ways)
    # Of the steps, Llama has other weights; the program itself compares the others' losses.
    assert all(row["tokens/s"] > 0 and 8 < row["first loss"] < 9 for row in rows[:-1])


def test_shards_need_their_text_tokenizer(capsys):
    assert main(["bench", "loader", "--shards", "somewhere"]) == 2
    assert "--text-tokenizer FILE" in capsys.readouterr().err


def test_nothing_to_time_is_refused(capsys):
    assert main(["bench", "head", "--rounds", "0"]) == 2
    assert main(["bench", "loader", "--rows", "0", "--batches", "-1"]) == 2
    told = capsys.readouterr().err
    assert all(f"{option}: must be at least 1" in told for option in ("--rounds 0", "--rows 0", "--batches -1"))


@pytest.mark.slow
def test_conversion(tmp_path: Path):
    sizes = ("model.hidden_size=64", "model.intermediate_size=128", "model.num_attention_heads=4")
    rows = bench(tmp_path, "convert", "model=step1_debug", *sizes, "--folder", str(tmp_path))
    assert len(rows) == 4 and all(row["seconds"] >= 0 and row["read GB"] > 0 for row in rows)


def test_loader(tmp_path: Path):
    rows = bench(tmp_path, "loader", "--batches", "2", "--rows", "2")
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


def test_packing_fills_rows_and_evens_ranks_out(tmp_path: Path):
    rows = measure(tmp_path, "packing.py", "--documents", "8000", "--sequence-length", "4096")
    fills = {way: min(row["fill %"] for row in rows if row["way"] == way) for way in {row["way"] for row in rows}}
    assert fills["this project's, 4,096 waiting"] >= 99.8 > fills["as they come"]
    dealt = json.loads((tmp_path / "results_ranks.json").read_text())["rows"]
    told = [row for row in dealt if row["excess %"] is not None]
    assert told and all(row["dealt"] < row["excess %"] for row in told)
