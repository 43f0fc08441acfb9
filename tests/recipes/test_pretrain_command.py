"""`stepaudio run pretrain` as a user types it: kill it, run it again, and it goes on as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

import pytest

from stepaudio_train.testing.killed_runs import kill_and_run_again
from stepaudio_train.training.report import read_metrics

QUIET = ["logging.wandb=disabled", "logging.tensorboard=false", "engine.device=cpu"]
SMALL = ["training.sequence_length=64", "training.checkpoint_every=4", "training.max_steps=14"]
LAYOUTS = {
    "local": (1, ["engine=local"]),
    "megatron": (2, ["engine=megatron", "engine.tensor_parallel=2"]),
}


def command(run_dir: Path, num_processes: int, *overrides: str) -> list[str]:
    program = [sys.executable, "-m", "stepaudio_train.cli", "run", "pretrain", "experiment=debug"]
    return [*program, *QUIET, *SMALL, *overrides, f"run_dir={run_dir}", "--nproc", str(num_processes)]


def trajectory(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("engine", LAYOUTS)
def test_killed_run_goes_on_bit_for_bit(engine, tmp_path):
    num_processes, overrides = LAYOUTS[engine]
    subprocess.run(command(tmp_path / "straight", num_processes, *overrides), check=True, capture_output=True)
    arguments = command(tmp_path / "killed", num_processes, *overrides)
    assert "going on from step" in kill_and_run_again(arguments, tmp_path / "killed", after_steps=6)
    straight = trajectory(tmp_path / "straight")
    assert [step for step, *_ in straight] == list(range(1, 15))
    assert trajectory(tmp_path / "killed") == straight


def test_refused_command_says_what_to_type(tmp_path):
    arguments = command(tmp_path / "run", 1, "+training.max_stpes=3", "engine.tensor_parallel=2")
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean training.max_steps?" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
