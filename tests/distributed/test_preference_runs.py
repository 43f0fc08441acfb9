"""Reward models and DPO on two ranks of either engine learn and measure what one process does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import recipes.dpo as dpo
import recipes.reward as reward
from stepaudio_train.config.schema import EngineConfig
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.testing.toy_preferences import toy_dpo_config, toy_reward_config, write_toy_preferences

# As in test_deepspeed_engine.py: the first file of this folder decides what all launches find imported.
PRELOAD = ["stepaudio_train.engines.megatron.engine", "stepaudio_train.engines.deepspeed.zero", "peft"]
ENGINES = {
    "tp2": {"name": "megatron", "tensor_parallel": 2},
    "pp2": {"name": "megatron", "pipeline_parallel": 2},
    "dp2": {"name": "megatron"},
    "cp2": {"name": "megatron", "context_parallel": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}
RECIPES = {"reward": (reward.main, toy_reward_config), "dpo": (dpo.main, toy_dpo_config)}
# The last batch has empty rows on one of the ranks.
LENGTH = {"epochs": 1.0, "eval_every": 2, "global_batch_rows": 8, "export_hf": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`<recipe> <engine>`: a run directory of each."""
    folder = tmp_path_factory.mktemp("runs")
    write_toy_preferences(folder)
    _run("local", {"name": "local"}, folder)
    run_distributed(_run_on_two_ranks, 2, folder, preload=PRELOAD)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_layout_learns_what_one_process_does(folder, recipe, engine):
    expected, found = (_lines(folder / f"{recipe} {name}" / "metrics.jsonl") for name in ("local", engine))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    # The level of scores is free, and so rounding's to decide; accuracies jump where two scores are as good as equal.
    names = {"reward": ("loss", "score/difference"), "dpo": ("loss", "reward/margin", "log_prob/rejected")}[recipe]
    for line, wanted in zip(found, expected, strict=True):
        keys = [key for key in wanted if key.removeprefix("val/") in names]
        assert {key: line[key] for key in keys} == {key: pytest.approx(wanted[key], rel=2e-3, abs=2e-4) for key in keys}
    assert "val/loss" in expected[-1]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_layout_scores_every_held_out_pair(folder, engine):
    expected, found = (_differences(folder / f"reward {name}") for name in ("local", engine))
    assert len(found) == 18 and found == {key: pytest.approx(value, abs=2e-3) for key, value in expected.items()}
    assert not (folder / f"reward {engine}" / "held_out_scores").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_every_layout_has_the_same_reference(folder, engine):
    for name in ("data", "held_out"):
        local, other = (folder / f"dpo {one}" / "reference" / name for one in ("local", engine))
        expected, found = (load_file(place / "pairs.safetensors")["values"].numpy() for place in (local, other))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert sorted(path.name for path in other.iterdir()) == ["made_by.json", "pairs.safetensors"]


def _differences(run: Path) -> dict[tuple[str, str], float]:
    lines = _lines(run / "held_out_pairs.jsonl")
    return {(line["prompt"], line["rejected"]): line["chosen_score"] - line["rejected_score"] for line in lines}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run_on_two_ranks(folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name, engine in ENGINES.items():
        _run(name, engine, folder)
    dist.destroy_process_group()


def _run(name: str, engine: dict, folder: Path) -> None:
    # Pages that nobody looks at take longer to draw than toy runs to learn.
    with pytest.MonkeyPatch.context() as patch:
        for module in (reward, dpo):
            patch.setattr(module, "write_preference_report", lambda run_dir: run_dir)
        for recipe, (main, config_of) in RECIPES.items():
            config = config_of(folder, folder / f"{recipe} {name}", **LENGTH)
            main(replace(config, engine=EngineConfig(device="cpu", **engine)))
