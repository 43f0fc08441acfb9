"""Every ZeRO stage gives the local engine's losses, gradient norms, metrics and weights; checkpoints go on.

As much as can runs in one launch, since starting processes is what takes the time.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainingConfig,
    VocabularyConfig,
)
from stepaudio_train.convert.deepspeed_files import DeepSpeedCheckpoint, find_tag
from stepaudio_train.convert.sources import LazyWeights
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.synthetic import SyntheticLoader
from stepaudio_train.engines.base import Engine, NonFiniteError
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.tokenizers.vocabulary import Vocabulary

# The first file of this folder decides what all launches find imported, the other engine's too.
PRELOAD = ["stepaudio_train.engines.megatron.engine", "stepaudio_train.engines.deepspeed.zero", "peft"]
STEPS, ROWS, LENGTH = 10, 8, 64

# Odd sizes everywhere: two ranks can cut no tensor evenly.
VOCABULARY = VocabularyConfig(text_size=345, linguistic_size=64, semantic_size=96, reserved_size=0)
MODEL = ModelConfig(
    hidden_size=15,
    intermediate_size=27,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_attention_groups=1,
    vocab_size=505,
)
CONFIG = PretrainConfig(
    model=MODEL,
    vocabulary=VOCABULARY,
    optimizer=OptimizerConfig(learning_rate=3e-3, embedding_learning_rate_multiplier=5.0, clip_grad_norm=1.0),
    training=TrainingConfig(sequence_length=LENGTH, global_batch_rows=ROWS),
)
LORA = LoraConfig(rank=4, alpha=12.0, targets=("q_proj", "v_proj", "down_proj"))
ADAPTED = replace(CONFIG, lora=LORA)
# Small tensors stay whole unless told otherwise, and all of the tests' are small.
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}

# name -> (configuration, engine fields, rows of a micro-batch)
FULL = {
    "stage 1": (CONFIG, {"zero_stage": 1}, 4),
    "stage 2": (CONFIG, {"zero_stage": 2}, 4),
    "stage 3": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL}, 4),
    "stage 3, small tensors whole": (CONFIG, {"zero_stage": 3}, 4),
    "stage 1, micro-batch of 1": (CONFIG, {"zero_stage": 1}, 1),
    "stage 2, micro-batch of 1": (CONFIG, {"zero_stage": 2}, 1),
    "stage 3, micro-batch of 1": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL}, 1),
    "stage 3, recompute": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL, "recompute": "full"}, 4),
    "stage 2, offload": (CONFIG, {"zero_stage": 2, "offload": "optimizer"}, 1),
    "stage 3, offload": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL, "offload": "optimizer"}, 2),
    "stage 3, offload all": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL, "offload": "all"}, 2),
}
ADAPTERS = {
    "adapters, stage 2": (ADAPTED, {"zero_stage": 2}, 4),
    "adapters, stage 3": (ADAPTED, {"zero_stage": 3, "extra": CUT_ALL}, 4),
    "adapters, stage 3, recompute": (ADAPTED, {"zero_stage": 3, "extra": CUT_ALL, "recompute": "offload"}, 2),
}
BF16 = {
    "stage 2": (CONFIG, {"zero_stage": 2, "precision": "bf16"}, 4),
    "stage 3": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL, "precision": "bf16"}, 4),
    "adapters": (ADAPTED, {"zero_stage": 3, "extra": CUT_ALL, "precision": "bf16"}, 4),
}
ONE_RANK = {name: FULL[name] for name in ("stage 1", "stage 3", "stage 2, offload")}

# Checkpoints: name -> (configuration, engine fields), and at which others each is read.
RUNS = {
    "stage 1": (CONFIG, {"zero_stage": 1}),
    "stage 2": (CONFIG, {"zero_stage": 2}),
    "stage 3": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL}),
    "bf16": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL, "precision": "bf16"}),
    "offload": (CONFIG, {"zero_stage": 3, "offload": "all"}),
    "adapters 2": (ADAPTED, {"zero_stage": 2}),
    "adapters 3": (ADAPTED, {"zero_stage": 3, "extra": CUT_ALL}),
}
OTHERS = {"stage 2": "stage 3", "stage 3": "stage 1", "adapters 3": "adapters 2"}
ON_ONE_RANK = ("stage 1", "stage 2", "stage 3", "bf16", "adapters 2", "adapters 3")
REFUSED = {"adapters 3": "stage 3", "stage 3": "adapters 3"}


@pytest.fixture(scope="module")
def reference() -> dict:
    """The local engine's trajectories, all weights and adapters."""
    return {config.lora: _trajectory(LocalEngine(config), 4) for config in (CONFIG, ADAPTED)}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    return run_distributed(_on_two_ranks, 2, preload=PRELOAD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(folder) -> dict:
    """What each saved run does after its checkpoint, and what is resumed from it."""
    return run_distributed(_save_and_resume, 2, folder, preload=PRELOAD)[0]


@pytest.fixture(scope="module")
def one_rank(runs, folder) -> dict:
    return run_distributed(_on_one_rank, 1, folder, preload=PRELOAD)[0]


@pytest.mark.parametrize("name", [*FULL, *ADAPTERS])
def test_two_ranks_give_the_local_engines_trajectory(reference, two_ranks, name):
    expected = reference[ADAPTED.lora if name in ADAPTERS else None]
    for rank, results in enumerate(two_ranks):
        got = results["layouts"][name]
        _compare(f"{name}, rank {rank}", got, expected)
        assert bool(got["weights"]) == (rank == 0)
        assert bool(got["adapters"]) == (rank == 0 and name in ADAPTERS)


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_gives_the_local_engines_trajectory(reference, one_rank, name):
    _compare(name, one_rank["layouts"][name], reference[None])


@pytest.mark.parametrize("name", BF16)
def test_bf16_follows_fp32(reference, two_ranks, name):
    expected = [loss for loss, _ in reference[BF16[name][0].lora]["steps"]]
    losses = [loss for loss, _ in two_ranks[0]["bf16"][name]["steps"]]
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected


def test_a_step_that_is_not_finite_stops_all_ranks_and_changes_nothing(two_ranks):
    for results in two_ranks:
        assert len(results["poisoned"]) == 8
        for case, (message, unchanged) in results["poisoned"].items():
            assert "nan" in message, case
            assert unchanged, case


def test_what_does_not_fit_is_told_on_every_rank(two_ranks):
    for results in two_ranks:
        missing, misshaped = results["refused"]
        assert "model.norm.weight" in missing
        assert "(15,)" in misshaped and "(7,)" in misshaped


@pytest.mark.parametrize("saved", RUNS)
def test_same_layout_goes_on_bit_for_bit(runs, saved):
    assert runs[saved, saved] == runs[saved]


@pytest.mark.parametrize("saved, resumed", OTHERS.items())
def test_another_stage_goes_on_nearly_the_same(runs, saved, resumed):
    assert runs[saved, resumed] == pytest.approx(runs[saved], rel=1e-4)


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_one_rank_reads_what_two_wrote(runs, one_rank, name):
    assert one_rank["resumed"][name] == pytest.approx(runs[name], rel=5e-3 if name == "bf16" else 1e-4)


def test_conversion_leaves_nothing_behind(runs, one_rank, folder):
    assert {path.name for path in folder.iterdir()} == set(RUNS)


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "stage 3", "bf16", "offload"])
def test_the_weights_alone_are_read_without_deepspeed(runs, folder, name):
    """As a run of another engine begins with them, or `stepaudio convert` does."""
    tag = find_tag(folder / name)
    assert tag is not None
    read = LazyWeights(DeepSpeedCheckpoint(tag, MODEL), MODEL)
    for weight, tensor in runs["saved weights", name].items():
        assert torch.equal(read[weight], tensor), weight


@pytest.mark.parametrize("saved", REFUSED)
def test_adapters_of_another_form_are_refused(one_rank, saved):
    assert "holds other adapters" in one_rank["refused"][saved]


def test_deepspeeds_own_tool_reads_a_checkpoint(runs, folder, tmp_path):
    """The script that DeepSpeed puts beside its checkpoints; it needs the file `latest`."""
    command = [sys.executable, "zero_to_fp32.py", ".", str(tmp_path), "--safe_serialization"]
    subprocess.run(command, cwd=folder / "stage 3", check=True, capture_output=True)
    read = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert read == {name: tensor.shape for name, tensor in InitialWeights(MODEL, 0).items()}


def _compare(name: str, got: dict, expected: dict) -> None:
    losses, norms = zip(*got["steps"], strict=True)
    expected_losses, expected_norms = zip(*expected["steps"], strict=True)
    assert losses == pytest.approx(expected_losses, rel=1e-4), name
    assert norms == pytest.approx(expected_norms, rel=1e-3), name
    for key in ("metrics", "evaluation"):
        assert list(got[key]) == list(expected[key]), name
        for metric, sums in expected[key].items():
            assert got[key][metric] == pytest.approx(sums, rel=1e-4, abs=1e-4), f"{name} {metric}"
    for key in ("weights", "adapters"):
        if got[key]:
            assert list(got[key]) == list(expected[key])
            for weight, tensor in expected[key].items():
                torch.testing.assert_close(got[key][weight], tensor, rtol=1e-3, atol=1e-4, msg=f"{name} {weight}")


def _on_two_ranks() -> dict:
    dist.init_process_group("gloo")
    results = {
        "layouts": _run_layouts(FULL | ADAPTERS),
        "bf16": _run_layouts(BF16),
        "poisoned": _poisoned(),
        "refused": _refused(),
    }
    dist.destroy_process_group()
    return results


def _on_one_rank(folder: Path) -> dict:
    dist.init_process_group("gloo")
    refused = {}
    for saved, resumed in REFUSED.items():
        try:
            _resume(folder / saved, resumed)
        except UserError as error:
            refused[saved] = str(error)
    results = {
        "layouts": _run_layouts(ONE_RANK),
        "resumed": {name: _resume(folder / name, name) for name in ON_ONE_RANK},
        "refused": refused,
    }
    dist.destroy_process_group()
    return results


def _run_layouts(layouts: dict) -> dict:
    results = {}
    for name, (config, fields, micro_batch_rows) in layouts.items():
        engine = _build(config, fields)
        results[name] = _trajectory(engine, micro_batch_rows)
        engine.close()
    return results


def _build(config: PretrainConfig, fields: dict) -> Engine:
    from stepaudio_train.engines.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(replace(config, engine=EngineConfig(name="deepspeed", device="cpu", **fields)))


def _trajectory(engine: Engine, micro_batch_rows: int) -> dict:
    objective = LanguageModelling(Vocabulary.from_config(VOCABULARY))
    engine.load_weights(InitialWeights(MODEL, 0))
    loader, steps, result = _loader(engine), [], None
    for step in range(STEPS):
        batch = _with_odd_weights(loader.next_batch())
        result = engine.train_step(batch.split(micro_batch_rows), objective, 3e-3 * (1 - 0.05 * step))
        steps.append((result.loss, result.grad_norm))
    evaluation = engine.evaluate(loader.validation_batches(1)[0].split(micro_batch_rows), objective)
    return {
        "steps": steps,
        "metrics": result.metrics,
        "evaluation": evaluation,
        "weights": dict(engine.export_weights()),
        "adapters": dict(engine.adapters()),
    }


def _poisoned() -> dict[str, tuple[str, bool]]:
    objective = LanguageModelling(Vocabulary.from_config(VOCABULARY))
    results = {}
    for stage in ("stage 1", "stage 2, offload", "stage 3", "stage 3, offload"):
        for where in ("loss weight", "weight"):
            engine = _build(CONFIG, FULL[stage][1])
            engine.load_weights(InitialWeights(MODEL, 0))
            batch = _loader(engine).next_batch()
            if where == "weight":
                engine.load_weights(_WithNan(InitialWeights(MODEL, 0)))
            elif engine.rank == 1:
                batch.loss_weights[0, 3] = float("nan")
            before, message = dict(engine.export_weights()), ""
            try:
                engine.train_step(batch.split(2), objective, 1e-3)
            except NonFiniteError as error:
                message = str(error)
            after = dict(engine.export_weights())
            same = all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
            results[f"{stage}, {where}"] = (message, same)
            engine.close()
    return results


class _WithNan(dict):
    """Weights of which one element is not a number."""

    def __init__(self, weights: InitialWeights) -> None:
        super().__init__(weights)
        self["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")


def _refused() -> list[str]:
    engine = _build(CONFIG, FULL["stage 3"][1])
    weights = dict(InitialWeights(MODEL, 0))
    del weights["model.norm.weight"]
    messages = []
    for changed in (weights, {**weights, "model.norm.weight": torch.ones(7)}):
        try:
            # Rank 0 alone reads.
            engine.load_weights(changed if engine.is_main else {})
        except (KeyError, ValueError) as error:
            messages.append(str(error))
    engine.close()
    return messages


def _save_and_resume(folder: Path) -> dict:
    dist.init_process_group("gloo")
    results = {}
    for saved, (config, fields) in RUNS.items():
        engine = _build(config, fields)
        engine.load_weights(InitialWeights(MODEL, 0))
        loader = _loader(engine)
        _train(engine, loader)
        if engine.is_main:
            (folder / saved).mkdir()
        engine.barrier()
        engine.save(folder / saved)
        results["saved weights", saved] = dict(engine.export_weights())
        results[saved] = _train(engine, loader)
        engine.close()
        for resumed in dict.fromkeys((saved, OTHERS.get(saved, saved))):
            results[saved, resumed] = _resume(folder / saved, resumed)
    dist.destroy_process_group()
    return results


def _resume(directory: Path, name: str) -> list[float]:
    """Go on from a checkpoint, in an engine that held other weights before. Adapters want their base first."""
    config, fields = RUNS[name]
    engine = _build(replace(config, training=replace(config.training, seed=1)), fields)
    engine.load_weights(InitialWeights(MODEL, 0 if config.lora else 1))
    loader = _loader(engine)
    loader.next_batch()
    loader.next_batch()
    engine.load(directory)
    steps = _train(engine, loader)
    engine.close()
    return steps


def _train(engine: Engine, loader: SyntheticLoader) -> list[float]:
    """Loss and gradient norm of two steps, one after the other."""
    objective = LanguageModelling(Vocabulary.from_config(VOCABULARY))
    results = [engine.train_step(loader.next_batch().split(2), objective, 3e-3) for _ in range(2)]
    return [number for result in results for number in (result.loss, result.grad_norm)]


def _loader(engine: Engine) -> SyntheticLoader:
    return SyntheticLoader(
        CONFIG.data,
        Vocabulary.from_config(VOCABULARY),
        LENGTH,
        ROWS,
        seed=0,
        data_parallel_rank=engine.data_parallel_rank,
        data_parallel_size=engine.data_parallel_size,
    )


def _with_odd_weights(batch: TokenBatch) -> TokenBatch:
    """Fractional weights and many zeros, unlike from row to row: no mean of means gives the right loss."""
    weights = batch.loss_weights.clone()
    weights[batch.input_ids % 3 == 0] *= 0.3
    weights[batch.input_ids % 5 == 0] = 0.0
    return replace(batch, loss_weights=weights)
