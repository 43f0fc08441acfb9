"""Every layout of the Megatron engine gives the local engine's losses, gradient norms, metrics and weights.

All layouts of one world size run in one launch, since starting processes is what takes the time.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepaudio_train.config.schema import (
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainingConfig,
    VocabularyConfig,
)
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.synthetic import SyntheticLoader
from stepaudio_train.engines.base import Engine, NonFiniteError
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.tokenizers.vocabulary import Vocabulary

PRELOAD = ["stepaudio_train.engines.megatron.engine"]
STEPS, ROWS, LENGTH = 10, 8, 64

# An odd vocabulary: tensor parallelism has to pad it.
VOCABULARY = VocabularyConfig(text_size=345, linguistic_size=64, semantic_size=96, reserved_size=0)
MODEL = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_attention_groups=2,
    vocab_size=505,
)
CONFIG = PretrainConfig(
    model=MODEL,
    vocabulary=VOCABULARY,
    optimizer=OptimizerConfig(learning_rate=3e-3, embedding_learning_rate_multiplier=5.0, clip_grad_norm=1.0),
    training=TrainingConfig(sequence_length=LENGTH, global_batch_rows=ROWS),
)

# name -> (engine fields, rows of a micro-batch)
LAYOUTS_1 = {"one process": ({}, 4)}
LAYOUTS_2 = {
    "tp2": ({"tensor_parallel": 2}, 4),
    "pp2": ({"pipeline_parallel": 2}, 2),
    "pp2 vp2": ({"pipeline_parallel": 2, "virtual_pipeline": 2}, 2),
    "dp2": ({}, 4),
    "dp2 plain optimizer": ({"distributed_optimizer": False}, 4),
    "dp2 micro-batch of 1": ({}, 1),
    "tp2 recompute full": ({"tensor_parallel": 2, "recompute": "full"}, 4),
    "pp2 vp2 recompute offload": ({"pipeline_parallel": 2, "virtual_pipeline": 2, "recompute": "offload"}, 2),
    # The head is as much work as three of the layers.
    "pp2 cut unevenly": ({"pipeline_parallel": 2, "extra": {"num_layers_in_first_pipeline_stage": 3}}, 4),
    "pp2 recompute selective": ({"pipeline_parallel": 2, "recompute": "selective"}, 4),
    "cp2": ({"context_parallel": 2}, 4),
    "cp2 plain optimizer": ({"context_parallel": 2, "distributed_optimizer": False}, 4),
    "cp2 recompute selective": ({"context_parallel": 2, "recompute": "selective"}, 4),
}
LAYOUTS_4 = {
    "tp2 pp2": ({"tensor_parallel": 2, "pipeline_parallel": 2}, 2),
    "tp2 dp2": ({"tensor_parallel": 2}, 2),
    "tp2 dp2 plain optimizer": ({"tensor_parallel": 2, "distributed_optimizer": False}, 2),
    "pp2 vp2 dp2": ({"pipeline_parallel": 2, "virtual_pipeline": 2}, 1),
    "pp4": ({"pipeline_parallel": 4}, 2),
    "cp4": ({"context_parallel": 4}, 4),
    "cp2 dp2": ({"context_parallel": 2}, 2),
    "cp2 dp2 plain optimizer": ({"context_parallel": 2, "distributed_optimizer": False}, 2),
    "tp2 cp2": ({"tensor_parallel": 2, "context_parallel": 2}, 2),
    "cp2 pp2 vp2": ({"context_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2}, 2),
    "cp2 pp2 recompute full": ({"context_parallel": 2, "pipeline_parallel": 2, "recompute": "full"}, 2),
}


@pytest.fixture(scope="module")
def reference():
    """The local engine's trajectory."""
    torch.manual_seed(0)
    return _trajectory(LocalEngine(CONFIG), 4)


@pytest.mark.parametrize("world_size, layouts", [(1, LAYOUTS_1), (2, LAYOUTS_2), (4, LAYOUTS_4)], ids=["1", "2", "4"])
def test_layouts_give_the_local_engines_trajectory(reference, world_size, layouts):
    results = run_distributed(_run_layouts, world_size, layouts, preload=PRELOAD)
    for rank, by_name in enumerate(results):
        assert list(by_name) == list(layouts)
        for name, got in by_name.items():
            _compare(f"{name}, rank {rank}", got, reference)


def test_non_finite_loss_stops_all_ranks_and_changes_nothing():
    for unchanged, message in run_distributed(_poisoned, 2, preload=PRELOAD):
        assert unchanged
        assert "nan" in message


def test_bf16_follows_fp32(reference):
    losses = run_distributed(_run_bf16, 2, preload=PRELOAD)[0]
    expected = [loss for loss, _ in reference["steps"]]
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected


def _compare(name: str, got: dict, expected: dict) -> None:
    losses, norms = zip(*got["steps"], strict=True)
    expected_losses, expected_norms = zip(*expected["steps"], strict=True)
    assert losses == pytest.approx(expected_losses, rel=1e-4), name
    assert norms == pytest.approx(expected_norms, rel=1e-3), name
    for key in ("metrics", "evaluation"):
        assert list(got[key]) == list(expected[key]), name
        for metric, sums in expected[key].items():
            assert got[key][metric] == pytest.approx(sums, rel=1e-4, abs=1e-4), f"{name} {metric}"
    if got["weights"]:
        assert list(got["weights"]) == list(expected["weights"])
        for weight, tensor in expected["weights"].items():
            torch.testing.assert_close(got["weights"][weight], tensor, rtol=1e-3, atol=1e-4, msg=f"{name} {weight}")


def _run_layouts(layouts: dict) -> dict:
    import torch.distributed as dist

    from stepaudio_train.engines.megatron.engine import MegatronEngine

    dist.init_process_group("gloo")
    results = {}
    for name, (fields, micro_batch_rows) in layouts.items():
        engine = MegatronEngine(replace(CONFIG, engine=EngineConfig(name="megatron", device="cpu", **fields)))
        results[name] = _trajectory(engine, micro_batch_rows)
        engine.close()
    dist.destroy_process_group()
    return results


def test_weights_are_read_whole_where_a_step_leaves_gathering_them_to_the_next_forward():
    """As it does on GPUs: until then a rank has the new values of its own part alone."""
    expected, found = run_distributed(_overlapping, 2, preload=PRELOAD)[0]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _overlapping() -> list[dict[str, torch.Tensor]]:
    import torch.distributed as dist

    from stepaudio_train.engines.megatron import engine as module

    dist.init_process_group("gloo")
    settings, exported = module.ddp_config, []
    for overlap in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            changed = {"overlap_param_gather": overlap}
            patch.setattr(module, "ddp_config", lambda *args, to=changed: replace(settings(*args), **to))
            engine = module.MegatronEngine(replace(CONFIG, engine=EngineConfig(name="megatron", device="cpu")))
        engine.load_weights(InitialWeights(MODEL, 0))
        objective = LanguageModelling(Vocabulary.from_config(VOCABULARY))
        engine.train_step([_loader(engine).next_batch()], objective, 1e-2)
        exported.append(dict(engine.export_weights()))
        engine.close()
    dist.destroy_process_group()
    return exported


def _run_bf16() -> list[float]:
    from stepaudio_train.engines.megatron.engine import MegatronEngine

    engine = EngineConfig(name="megatron", device="cpu", precision="bf16", tensor_parallel=2)
    built = MegatronEngine(replace(CONFIG, engine=engine))
    losses = [loss for loss, _ in _trajectory(built, 4)["steps"]]
    built.close()
    return losses


def _poisoned() -> tuple[bool, str]:
    from stepaudio_train.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(replace(CONFIG, engine=EngineConfig(name="megatron", device="cpu")))
    engine.load_weights(InitialWeights(MODEL, 0))
    before = {n: p.detach().clone() for n, p in engine._chunks[0].named_parameters()}
    batch = _loader(engine).next_batch()
    if engine.rank == 1:
        batch.loss_weights[0, 3] = float("nan")
    message = ""
    try:
        engine.train_step([batch], LanguageModelling(Vocabulary.from_config(VOCABULARY)), 1e-3)
    except NonFiniteError as error:
        message = str(error)
    unchanged = all(torch.equal(before[n], p) for n, p in engine._chunks[0].named_parameters())
    engine.close()
    return unchanged, message


def _trajectory(engine: Engine, micro_batch_rows: int) -> dict:
    objective = LanguageModelling(Vocabulary.from_config(VOCABULARY))
    engine.load_weights(InitialWeights(MODEL, 0))
    loader, steps, result = _loader(engine), [], None
    for step in range(STEPS):
        batch = _with_odd_weights(loader.next_batch())
        result = engine.train_step(batch.split(micro_batch_rows), objective, 3e-3 * (1 - 0.1 * step))
        steps.append((result.loss, result.grad_norm))
    evaluation = engine.evaluate(loader.validation_batches(1)[0].split(micro_batch_rows), objective)
    return {
        "steps": steps,
        "metrics": result.metrics,
        "evaluation": evaluation,
        "weights": dict(engine.export_weights()),
    }


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
