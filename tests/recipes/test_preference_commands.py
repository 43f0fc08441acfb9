"""`stepaudio run reward` and `stepaudio run dpo` as a user types them; a killed one goes on as if nothing were."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepaudio_train.testing.killed_runs import kill_and_run_again
from stepaudio_train.testing.recipes import run_here
from stepaudio_train.testing.toy_preferences import MODEL, VOCABULARY, write_toy_preferences
from stepaudio_train.training.report import read_metrics

QUIET = ["logging.wandb=disabled", "logging.tensorboard=false", "logging.progress_bar=false"]
SIZES = [f"model.{name}={value}" for name, value in asdict(MODEL).items() if name not in ("init", "value_head")]
SIZES += [f"vocabulary.{name}={value}" for name, value in asdict(VOCABULARY).items() if value is not None]
ENGINE = ["engine.device=cpu", "engine.precision=fp32", "optimizer.learning_rate=2e-3", "training.checkpoint_every=3"]
ROWS = ["training.sequence_length=128", "training.global_batch_rows=4", "training.micro_batch_rows=2", "data.epochs=2"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_preferences(folder)
    return folder


def typed(toy: Path, run_dir: Path, *overrides: str) -> list[str]:
    data = [f"model.init={toy / 'weights'}", f"data={toy / 'train.jsonl'}", f"data.held_out={toy / 'held_out.jsonl'}"]
    return [*SIZES, *ENGINE, *ROWS, *QUIET, *data, *overrides, f"run_dir={run_dir}"]


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model-00001.safetensors")


def test_reward_model_is_made_and_measured(toy, tmp_path):
    run_here("reward", typed(toy, tmp_path / "run", "loss.margin_scale=0.5"))
    assert "val/accuracy/odd" in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert len((tmp_path / "run" / "held_out_pairs.jsonl").read_text().splitlines()) == 18
    assert "Reliability" in (tmp_path / "run" / "report.html").read_text()
    assert "value_head.weight" in exported(tmp_path / "run")


def test_killed_dpo_goes_on_bit_for_bit(toy, tmp_path):
    runs = [tmp_path / "straight", tmp_path / "killed"]
    command = [sys.executable, "-m", "stepaudio_train.cli", "run", "dpo"]
    run_here("dpo", typed(toy, runs[0]))
    assert "going on from step" in kill_and_run_again([*command, *typed(toy, runs[1])], runs[1], after_steps=5)
    learned = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run / "metrics.jsonl")]
        for run in runs
    ]
    assert (
        learned[0] == learned[1]
        and len(learned[0]) > 9
        and "val/accuracy" in read_metrics(runs[1] / "metrics.jsonl")[-1]
    )
    straight, killed = map(exported, runs)
    assert all(torch.equal(tensor, killed[name]) for name, tensor in straight.items())
    assert "value_head.weight" not in straight
