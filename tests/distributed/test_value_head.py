"""Every layout of every engine gives the local engine's log-probabilities, entropies and values, and learns from all.

A launch an engine and world size; every layout in it takes the same steps: a loss of all three outputs, then one of the
values alone, as of a reward model, then the first again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stepaudio_train.config.schema import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainingConfig,
    VocabularyConfig,
)
from stepaudio_train.convert.deepspeed_files import DeepSpeedCheckpoint
from stepaudio_train.convert.megatron_files import MegatronCheckpoint
from stepaudio_train.convert.sources import LazyWeights
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.engines.base import Engine
from stepaudio_train.engines.build import build_engine
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.objectives.base import ObjectiveOutput, TokenOutputs
from stepaudio_train.testing.distributed import run_distributed

# The first file of this folder decides what all launches find imported.
PRELOAD = ["stepaudio_train.engines.megatron.engine", "stepaudio_train.engines.deepspeed.zero", "peft"]
ROWS, LENGTH = 8, 32

# An odd vocabulary: tensor parallelism has to pad it.
VOCABULARY = VocabularyConfig(text_size=345, linguistic_size=64, semantic_size=96, reserved_size=0)
MODEL = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_attention_groups=2,
    vocab_size=505,
    init_std=0.1,
    value_head=True,
)
CONFIG = PretrainConfig(
    model=MODEL,
    vocabulary=VOCABULARY,
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.5, embedding_learning_rate_multiplier=5.0),
    training=TrainingConfig(sequence_length=LENGTH, global_batch_rows=ROWS),
)
ADAPTED = replace(CONFIG, lora=LoraConfig(rank=4, alpha=12.0, targets=("q_proj", "v_proj", "down_proj")))
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}

# name -> (configuration, engine fields)
MEGATRON_2 = {
    "tp2": (CONFIG, {"tensor_parallel": 2}),
    "pp2": (CONFIG, {"pipeline_parallel": 2}),
    "dp2": (CONFIG, {}),
    "cp2": (CONFIG, {"context_parallel": 2}),
    "pp2 vp2 plain optimizer": (
        CONFIG,
        {"pipeline_parallel": 2, "virtual_pipeline": 2, "distributed_optimizer": False},
    ),
}
MEGATRON_4 = {
    "tp2 pp2": (CONFIG, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "tp2 cp2": (CONFIG, {"tensor_parallel": 2, "context_parallel": 2}),
}
DEEPSPEED_2 = {
    "stage 1": (CONFIG, {"zero_stage": 1}),
    "stage 2": (CONFIG, {"zero_stage": 2}),
    "stage 3": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL}),
    "adapters, stage 2": (ADAPTED, {"zero_stage": 2}),
    "adapters, stage 3": (ADAPTED, {"zero_stage": 3, "extra": CUT_ALL}),
}
LAUNCHES = {("megatron", 2): MEGATRON_2, ("megatron", 4): MEGATRON_4, ("deepspeed", 2): DEEPSPEED_2}
BF16 = {"megatron": {"tensor_parallel": 2}, "deepspeed": {"zero_stage": 3, "extra": CUT_ALL}}
# Saved by the one, read by the other.
RESUMED = {
    "megatron": [("tp2", "pp2"), ("pp2 vp2 plain optimizer", "pp2 vp2 plain optimizer")],
    "deepspeed": [("stage 3", "stage 2"), ("adapters, stage 3", "adapters, stage 3")],
}


class Mixed:
    """A loss of all that there is: the target's log-probability, entropy, and values of all tokens."""

    needs_entropies = True

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        assert outputs.entropies is not None and outputs.values is not None
        weights = batch.loss_weights
        policy = -(weights * (outputs.log_probs + 0.3 * outputs.entropies)).sum()
        value = (outputs.values - batch.extras["returns"]).square().sum()
        metrics = {"entropy": torch.stack([(weights * outputs.entropies).sum().detach(), weights.sum()])}
        return ObjectiveOutput(policy + 0.5 * value, weights.sum(), metrics)


class ValuesAlone:
    """A loss that leaves the language model's head alone."""

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        assert outputs.entropies is None and outputs.values is not None
        errors = (outputs.values - batch.extras["returns"]).square() * batch.loss_weights
        return ObjectiveOutput(errors.sum(), batch.loss_weights.sum(), {})


STEPS = (Mixed(), ValuesAlone(), Mixed())


@pytest.fixture(scope="module")
def reference() -> dict:
    """The local engine's trajectories, of all weights and of adapters."""
    return {config.lora: _trajectory(build_engine(config)) for config in (CONFIG, ADAPTED)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("engine, world_size", LAUNCHES)
def test_layouts_give_the_local_engines_outputs_and_weights(reference, folder, engine, world_size):
    layouts = LAUNCHES[engine, world_size]
    results = run_distributed(_run_layouts, world_size, engine, layouts, folder / engine, preload=PRELOAD)
    for rank, result in enumerate(results):
        for name, got in result["layouts"].items():
            _compare(f"{name}, rank {rank}", got, reference[layouts[name][0].lora])
        for pair, (expected, found) in result.get("resumed", {}).items():
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=0, msg=str(pair))
    if world_size == 2:
        losses = [loss for loss, _ in reference[None]["steps"]]
        assert results[0]["bf16"] == pytest.approx(losses, rel=0.02)
        # Without the engine: as a critic begins with them, or `stepaudio convert` does.
        saved = folder / engine / RESUMED[engine][0][0]
        reader = (
            MegatronCheckpoint(saved, MODEL) if engine == "megatron" else DeepSpeedCheckpoint(saved / "state", MODEL)
        )
        read = LazyWeights(reader, MODEL)
        for name, tensor in results[0]["saved weights"].items():
            assert torch.equal(read[name], tensor), name


def _compare(name: str, got: dict, expected: dict) -> None:
    for when in ("before", "after", "without adapters"):
        assert (got[when] is None) == (expected[when] is None)
        for kind, tensor in (expected[when] or {}).items():
            mine = tensor.chunk(got["replicas"])[got["replica"]]
            tolerance = 1e-5 if when != "after" else 1e-3
            message = f"{name}: {kind} {when}"
            torch.testing.assert_close(got[when][kind], mine, rtol=tolerance, atol=tolerance, msg=message)
    for found, wanted in zip(got["steps"], expected["steps"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4), name
    assert got["metrics"] == {key: pytest.approx(sums, rel=1e-4) for key, sums in expected["metrics"].items()}
    if got["weights"]:
        assert list(got["weights"]) == list(expected["weights"])
        assert list(got["weights"])[-2:] == ["value_head.weight", "value_head.bias"]
        for weight, tensor in expected["weights"].items():
            torch.testing.assert_close(got["weights"][weight], tensor, rtol=1e-4, atol=1e-4, msg=f"{name} {weight}")


def _run_layouts(engine: str, layouts: dict, folder: Path) -> dict:
    dist.init_process_group("gloo")

    def build(name: str) -> Engine:
        config, fields = layouts[name]
        return build_engine(replace(config, engine=EngineConfig(name=engine, device="cpu", **fields)))

    results: dict = {"layouts": {}}
    for name in layouts:
        built = build(name)
        results["layouts"][name] = _trajectory(built)
        built.close()
    if dist.get_world_size() == 2:
        results |= _resumed(build, folder, RESUMED[engine])
        bf16 = EngineConfig(name=engine, device="cpu", precision="bf16", **BF16[engine])
        built = build_engine(replace(CONFIG, engine=bf16))
        results["bf16"] = [loss for loss, _ in _trajectory(built)["steps"]]
        built.close()
    dist.destroy_process_group()
    return results


def _resumed(build, folder: Path, pairs: list) -> dict:
    results: dict = {"resumed": {}}
    for saved, resumed in pairs:
        built = build(saved)
        built.load_weights(_weights())
        _train(built, range(2))
        if built.is_main:
            (folder / saved).mkdir(parents=True)
        built.barrier()
        built.save(folder / saved)
        results.setdefault("saved weights", dict(built.export_weights()))
        expected = _train(built, range(2, 3))
        built.close()
        built = build(resumed)
        built.load_weights(_weights())
        built.load(folder / saved)
        results["resumed"][saved, resumed] = (expected, _train(built, range(2, 3)))
        built.close()
    return results


def _trajectory(engine: Engine) -> dict:
    engine.load_weights(_weights())
    result = {"replica": engine.data_parallel_rank, "replicas": engine.data_parallel_size, "before": _outputs(engine)}
    result["steps"] = _train(engine, range(len(STEPS)))
    result["metrics"] = engine.evaluate(_micro_batches(engine, 9), STEPS[0])
    result["after"], result["without adapters"] = _outputs(engine), None
    if engine.config.lora is not None:
        with engine.without_adapters():
            result["without adapters"] = _outputs(engine)
        # What was switched off is on again, and still trained.
        result["steps"] += _train(engine, range(1))
    result["weights"] = dict(engine.export_weights())
    return result


def _outputs(engine: Engine) -> dict[str, torch.Tensor]:
    """Of this rank's rows of one batch, [R, T] each."""
    batches = _micro_batches(engine, 9)
    with_entropies, without = engine.outputs(batches, entropies=True), engine.outputs(batches)
    assert all(other.entropies is None for other in without)
    assert all(torch.equal(a.values, b.values) for a, b in zip(with_entropies, without, strict=True))
    assert not any(outputs.values.requires_grad for outputs in with_entropies)
    return {
        name: torch.cat([getattr(outputs, name) for outputs in with_entropies])
        for name in ("log_probs", "entropies", "values")
    }


def _train(engine: Engine, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    results = [engine.train_step(_micro_batches(engine, step), STEPS[step], 3e-3) for step in steps]
    return [(result.loss, result.grad_norm) for result in results]


def _weights() -> dict[str, torch.Tensor]:
    """A value head that says something, so that the layers under it learn from it at once."""
    head = torch.randn(1, MODEL.hidden_size, generator=torch.Generator().manual_seed(0))
    return {**InitialWeights(MODEL, 0), "value_head.weight": head, "value_head.bias": torch.full((1,), 0.3)}


def _micro_batches(engine: Engine, seed: int) -> list[TokenBatch]:
    """This rank's rows: random ids, odd documents, fractional weights and many zeros."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, LENGTH)
    ids, targets = torch.randint(0, MODEL.vocab_size, (2, *shape), generator=generator)
    weights = torch.rand(shape, generator=generator)
    batch = TokenBatch(
        ids,
        targets,
        weights * (weights > 0.4),
        (torch.rand(shape, generator=generator) < 0.1).cumsum(1).int(),
        torch.zeros(shape, dtype=torch.int8),
        {"returns": torch.randn(shape, generator=generator)},
    )
    rows = ROWS // engine.data_parallel_size
    return batch.split(rows)[engine.data_parallel_rank].split(2)
