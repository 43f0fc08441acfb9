"""`stepaudio run ppo` and `stepaudio run grpo` as a user types them; a killed one goes on as if nothing were."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stepaudio_train.testing.killed_runs import kill_and_run_again
from stepaudio_train.testing.recipes import run_here
from stepaudio_train.testing.toy_preferences import MODEL, VOCABULARY
from stepaudio_train.testing.toy_rewards import write_toy_rewards
from stepaudio_train.training.report import read_metrics

QUIET = ["logging.wandb=disabled", "logging.tensorboard=false", "logging.progress_bar=false"]
SIZES = [f"model.{name}={value}" for name, value in asdict(MODEL).items() if name not in ("init", "value_head")]
SIZES += [f"vocabulary.{name}={value}" for name, value in asdict(VOCABULARY).items() if value is not None]
ENGINE = ["engine.device=cpu", "engine.precision=fp32", "optimizer.learning_rate=1e-3", "training.checkpoint_every=3"]
ROWS = ["training.sequence_length=128", "training.micro_batch_rows=2", "training.epochs_per_iteration=2"]
ANSWERS = ["data.prompts_per_iteration=8", "rollout.max_new_tokens=12", "reward.rules={length:1}", "reward.max_words=2"]
TIMED = {"answering_s", "measuring_s", "tokens_per_s", "elapsed_s", "mfu"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_rewards(folder)
    return folder


def typed(toy: Path, run_dir: Path, *overrides: str) -> list[str]:
    data = [f"model.init={toy / 'weights'}", f"data={toy / 'prompts.jsonl'}", f"run_dir={run_dir}"]
    return [*SIZES, *ENGINE, *ROWS, *ANSWERS, *QUIET, *data, *overrides]


def test_killed_ppo_goes_on_bit_for_bit(toy, tmp_path):
    runs = [tmp_path / "straight", tmp_path / "killed"]
    more = ["critic.warmup_steps=2", "training.max_steps=12", "training.sample_every=6"]
    command = [sys.executable, "-m", "stepaudio_train.cli", "run", "ppo"]
    run_here("ppo", typed(toy, runs[0], *more))
    assert "going on from step" in kill_and_run_again([*command, *typed(toy, runs[1], *more)], runs[1], after_steps=5)
    learned = [
        [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(run / "metrics.jsonl")]
        for run in runs
    ]
    assert learned[0] == learned[1] and len(learned[0]) == 12 and "value/explained_variance" in learned[0][0]
    names = ("export/model-00001.safetensors", "samples/step_00000012.jsonl", "samples/step_00000006.jsonl")
    for name in names:
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    assert "value_head.weight" not in load_file(runs[0] / names[0])
    assert "How far the policy went" in (runs[1] / "report.html").read_text(encoding="utf-8")


def test_grpo_is_refused_what_cannot_be_and_else_learns(toy, tmp_path, capsys):
    impossible = ["loss.group_size=1", "rollout.temperature=0", "reward.model=gone"]
    with pytest.raises(SystemExit) as refusal:
        run_here("grpo", typed(toy, tmp_path / "run", *impossible))
    assert refusal.value.code == 2 and not (tmp_path / "run").exists()
    told = capsys.readouterr().err
    for part in ("type loss.group_size=8", "type rollout.temperature=1", "reward.model=gone: no such folder"):
        assert part in told
    run_here("grpo", typed(toy, tmp_path / "run", "loss.group_size=2", "training.max_steps=2"))
    assert [line["iteration"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 0]
