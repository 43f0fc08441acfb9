"""`stepaudio plan`: counts that add up, activations that a backward really keeps, remedies that fit."""

import json
from dataclasses import replace

import pytest
import torch

from stepaudio_train.cli import main
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.models.step1.attention import alibi_slopes, build_attention_bias
from stepaudio_train.models.step1.modeling import DecoderLayer
from stepaudio_train.training.plan import layer_activation_bytes, plan_run, remedies

GIB = 2**30
LARGE = [
    "model=step1_130b",
    "vocabulary=released",
    "engine=megatron",
    "engine.precision=bf16",
    "engine.tensor_parallel=8",
    "engine.pipeline_parallel=8",
    "training.sequence_length=8192",
    "training.micro_batch_rows=1",
    "training.global_batch_rows=512",
    "data.num_streams=32",
]


def configured(*overrides: str) -> PretrainConfig:
    return load_config("pretrain", PretrainConfig, overrides)


def test_ranks_hold_the_whole_model_once():
    plan = plan_run(configured(*LARGE), 512)
    assert plan.parameters == 131_946_590_208
    # Cut over 8 tensor-parallel ranks; only the norms are held by every one of them.
    norms = (2 * 88 + 1) * 12288
    assert sum(stage.parameters for stage in plan.stages) * 8 == plan.parameters + 7 * norms
    assert (plan.data_parallel, plan.micro_batches) == (8, 64)


def test_bytes_per_parameter():
    stage = plan_run(configured(*LARGE), 512).stages[3]
    p = stage.parameters
    assert (stage.weights, stage.gradients, stage.optimizer) == (2 * p, 4 * p, -(-12 * p // 8))
    local = plan_run(configured(), 1).stages[0]
    assert (local.weights, local.gradients, local.optimizer) == tuple(n * 3_012_000 for n in (4, 4, 8))


def test_earlier_stages_keep_more_micro_batches():
    activations = [stage.activations for stage in plan_run(configured(*LARGE), 512).stages]
    assert activations[0] - activations[1] == activations[1] - activations[2] > 0
    # With 4 micro-batches a step there are never more than 4 in flight; stage 6 has 2.
    few = plan_run(configured(*LARGE, "training.global_batch_rows=32"), 512)
    assert [stage.activations for stage in few.stages[:5]] == [2 * activations[6]] * 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_a_backward_keeps(precision: str):
    overrides = ("engine.device=cpu", f"engine.precision={precision}", "training.micro_batch_rows=2")
    config = configured(*overrides, "training.sequence_length=96", "model.hidden_size=256")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    layer = DecoderLayer(config.model, 0)
    documents = torch.zeros(2, 96, dtype=torch.int32)
    bias = build_attention_bias(documents, alibi_slopes(config.model.num_attention_heads), dtype)
    assert bias.dense is not None
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(2, 96, 256, requires_grad=True)
    autocast = torch.autocast("cpu", dtype, enabled=precision == "bf16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x, bias, None)
    # Weights (and autocast's copies of them, transposed or not) and the bias are counted elsewhere.
    elsewhere = {tuple(sorted(p.shape)) for p in layer.parameters()} | {tuple(sorted(bias.dense.shape))}
    measured = sum(t.untyped_storage().nbytes() for t in kept.values() if tuple(sorted(t.shape)) not in elsewhere)
    assert layer_activation_bytes(config) == pytest.approx(measured, rel=0.03)


def test_full_recomputation_keeps_little():
    config = configured(*LARGE)
    full = replace(config, engine=replace(config.engine, recompute="full"))
    assert plan_run(full, 512).stages[0].activations < plan_run(config, 512).stages[0].activations / 5


def test_interleaving_costs_activations():
    config = configured(*LARGE)
    virtual = replace(config, engine=replace(config.engine, virtual_pipeline=11))
    # Stage 0 of 8: 8 whole stages under 1F1B; 2 * 7 + 10 * 8 + 1 chunks of an eleventh under the interleaved one.
    layers = [plan_run(c, 512).stages[0].activations / layer_activation_bytes(config) for c in (config, virtual)]
    assert layers == [88, 95]


def test_remedies_fit_and_are_what_they_say():
    config = configured(*LARGE)
    found = remedies(config, 512, 40 * GIB)
    assert found
    for remedy in found:
        changed = configured(*LARGE, *remedy.overrides)
        assert plan_run(changed, remedy.world_size).peak == remedy.peak <= 40 * GIB
    assert remedies(config, 512, 1 * GIB) == []


def test_command_says_whether_it_fits_and_writes_the_shapes(tmp_path, capsys):
    shapes, resolved = tmp_path / "shapes.json", tmp_path / "config.yaml"
    arguments = ["plan", *LARGE, "--world-size", "512", "--memory-gib"]
    assert main([*arguments, "80", "--parameters-json", str(shapes), "--write-config", str(resolved)]) == 0
    assert "It fits" in capsys.readouterr().out
    written = json.loads(shapes.read_text())
    assert len(written) == 795 and written["lm_head.weight"] == [74752, 12288]
    assert "pipeline_parallel: 8" in resolved.read_text()
    assert main([*arguments, "40"]) == 1
    assert "engine." in capsys.readouterr().out.split("It would")[1]


def test_impossible_layouts_are_refused(capsys):
    assert main(["plan", *LARGE, "--world-size", "100", "training.sequence_length=8191"]) == 2
    errors = capsys.readouterr().err
    assert "must divide the number of" in errors and "training.sequence_length=8191" in errors
