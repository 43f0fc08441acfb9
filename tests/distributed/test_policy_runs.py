"""PPO and GRPO on every engine and layout make the same first updates as one process, of the same answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import recipes.grpo as grpo
import recipes.ppo as ppo
import recipes.sft as sft
from stepaudio_train.config.policy_runs import CriticConfig, RewardSourceConfig
from stepaudio_train.config.schema import EngineConfig, OptimizerConfig
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.testing.toy_rewards import (
    toy_grpo_config,
    toy_guessing_config,
    toy_ppo_config,
    write_toy_opinions,
    write_toy_rewards,
)

# As in test_deepspeed_engine.py: the first file of this folder decides what all launches find imported.
PRELOAD = ["stepaudio_train.engines.megatron.engine", "stepaudio_train.engines.deepspeed.zero", "peft"]
ENGINES = {
    "tp2": {"name": "megatron", "tensor_parallel": 2},
    "pp2": {"name": "megatron", "pipeline_parallel": 2},
    "dp2": {"name": "megatron"},
    "cp2": {"name": "megatron", "context_parallel": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}
RUNS = [("ppo", engine) for engine in ENGINES] + [("grpo", engine) for engine in ("dp2", "zero3")]
"""What GRPO has of its own, means over an answer's group, is computed by replicas: layouts within one are PPO's."""
# Two iterations, of which the second one is answered by a policy that has learned; a checkpoint within each.
STEPS = {"max_steps": 4, "epochs_per_iteration": 2, "micro_batch_rows": 2, "export_hf": False}
APART = {"ppo apart local": 2, "grpo apart dp2": 3}
"""Runs whose judges have the last rank to themselves -> ranks in all."""
KEYS = {
    "ppo": ("score", "kl/answer", "loss", "grad_norm", "entropy", "kl/reference", "loss/value", "critic/grad_norm"),
    "grpo": ("score", "kl/answer", "loss", "grad_norm", "entropy", "kl/reference"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`<recipe> <engine>`: a run directory of each."""
    folder = tmp_path_factory.mktemp("runs")
    write_toy_rewards(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepaudio_train.training.loop.write_run_report", lambda run_dir: run_dir)
        sft.main(toy_guessing_config(folder, folder / "guess"))
    write_toy_opinions(folder / "guess", folder / "opinions")
    for recipe in KEYS:
        _learn(recipe, "local", {"name": "local"}, folder)
    run_distributed(_run_on_two_ranks, 2, folder, preload=PRELOAD)
    run_distributed(_learn, 1, "ppo", "moved", ENGINES["dp2"], folder, preload=PRELOAD)
    for name, num_ranks in APART.items():
        recipe, _, engine = name.split()
        run_distributed(
            _learn_apart, num_ranks, recipe, name, ENGINES.get(engine, {"name": engine}), folder, preload=PRELOAD
        )
    return folder


@pytest.mark.parametrize("recipe, engine", RUNS)
def test_first_updates_are_those_of_one_process(folder, recipe, engine):
    expected, found = (_lines(folder / f"{recipe} {name}" / "metrics.jsonl") for name in ("local", engine))
    assert len(found) == len(expected) == 4 and expected[1]["grad_norm"] > 0
    for line, wanted in zip(found, expected, strict=True):
        keys = KEYS[recipe]
        assert {k: line[k] for k in keys} == {k: pytest.approx(wanted[k], rel=1e-4, abs=1e-4) for k in keys}
        assert (line["length"], line["ended"]) == (wanted["length"], wanted["ended"]), "the same answers"


@pytest.mark.parametrize("name", APART)
def test_judges_on_ranks_of_their_own_change_nothing(folder, name):
    recipe = name.split()[0]
    expected, found = (_lines(folder / run / "metrics.jsonl") for run in (f"{recipe} local", f"{recipe} {name}"))
    assert len(found) == len(expected) == 4 and expected[0]["score"] != 0
    for line, wanted in zip(found, expected, strict=True):
        keys = KEYS[recipe]
        assert {k: line[k] for k in keys} == {k: pytest.approx(wanted[k], rel=1e-4, abs=1e-4) for k in keys}


def test_a_run_goes_on_at_another_number_of_replicas(folder):
    """Step 4 of `ppo moved` was made on one rank, after a checkpoint of two, with the answers that these gave."""
    expected, found = (_lines(folder / f"ppo {name}" / "metrics.jsonl") for name in ("dp2", "moved"))
    keys = KEYS["ppo"]
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line, wanted in zip(found, expected, strict=True):
        assert {k: line[k] for k in keys} == {k: pytest.approx(wanted[k], rel=1e-4, abs=1e-4) for k in keys}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run_on_two_ranks(folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for recipe, engine in RUNS:
        _learn(recipe, engine, ENGINES[engine], folder)
    _learn("ppo", "moved", ENGINES["dp2"], folder, max_steps=3)
    dist.destroy_process_group()


def _learn_apart(recipe: str, name: str, engine: dict, folder: Path) -> None:
    _learn(recipe, name, engine, folder, judge_ranks=1)


def _learn(recipe: str, name: str, engine: dict, folder: Path, judge_ranks: int = 0, **training: int) -> None:
    config_of = toy_ppo_config if recipe == "ppo" else toy_grpo_config
    # Adam's first steps make much of gradients that are next to nothing, such as rounding; a larger eps makes less.
    fields = {"optimizer": OptimizerConfig(learning_rate=1e-3, eps=1e-4)}
    if recipe == "ppo":
        fields["critic"] = CriticConfig(warmup_steps=1, optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-4))
        fields["reward"] = RewardSourceConfig(model=str(folder / "opinions"), rules={"exact": 1.0})
    config = config_of(folder, folder / "guess", folder / f"{recipe} {name}", **fields)
    config = replace(
        config,
        engine=EngineConfig(device="cpu", **engine),
        data=replace(config.data, prompts_per_iteration=16 // config.answers_per_prompt),
        training=replace(config.training, **{**STEPS, **training}),
        judge_ranks=judge_ranks,
    )
    module = ppo if recipe == "ppo" else grpo
    # Pages that nobody looks at take longer to draw than toy runs to learn.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_policy_report", lambda run_dir: run_dir)
        module.main(config)
