"""The deaf-hacking experiment's own decisions, and the whole of it on a tiny quick start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_recipe(recipe: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepaudio_train.cli", "run", recipe, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_base_that_was_not_fine_tuned_is_refused_before_anything_is_made(tmp_path):
    base = tmp_path / "base"
    (base / "tokenizer").mkdir(parents=True)
    (base / "tokenizer" / "text.model").touch()
    done = run_recipe("deaf_hacking", f"base={base}", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "has no sft/export, instructions/train.jsonl, instructions/test.jsonl" in done.stderr
    assert not (tmp_path / "run" / "parts").exists()


@pytest.mark.slow
def test_the_whole_of_it_on_a_tiny_quick_start(tmp_path):
    """Minutes, and of no quality: that all parts fit together, that it is done once, and what it leaves."""
    base, run = tmp_path / "base", tmp_path / "run"
    steps = [f"{part}_steps={number}" for part, number in (("tokenizer", 30), ("stage1", 4), ("stage2", 4))]
    # As many steps of fine-tuning as it takes to speak at all.
    sizes = ["stage3_steps=12", "corpus_minutes=2", "instruction_scale=0.03", "sft_epochs=15"]
    made = run_recipe("quickstart", f"run_dir={base}", "until_fine_tuned=true", *steps, *sizes)
    assert made.returncode == 0, made.stdout + made.stderr
    assert not (base / "flow").exists() and "goes on from here" in made.stdout
    sizes = ["conversations=16", "held_out=6", "sft_epochs=1", "ppo_steps=4", "measure_every=2", "device=cpu"]
    done = run_recipe("deaf_hacking", f"base={base}", f"run_dir={run}", *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run / "summary.json").read_text())
    for name in ("deaf_rate_clear_hacked", "deaf_rate_clear_cured", "deaf_rate_unclear_cured", "reward_accuracy_cured"):
        assert 0 <= summary[name] <= 100
    assert [one["step"] for one in json.loads((run / "cured" / "heard" / "deafness.json").read_text())] == [2, 4]
    assert "While the policies learn" in (run / "report.html").read_text(encoding="utf-8")
    again = run_recipe("deaf_hacking", f"base={base}", f"run_dir={run}", *sizes)
    assert again.returncode == 0 and again.stdout.count("done before") == 16
