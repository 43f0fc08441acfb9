"""`stepaudio plan`: counts that add up, activations that a backward really keeps, peaks that runs really have, remedies
that fit."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepaudio_train.cli import main
from stepaudio_train.config.checks import layout_problems
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.policy_runs import GrpoRunConfig, PpoRunConfig
from stepaudio_train.config.schema import LoraConfig, PretrainConfig, RunConfig
from stepaudio_train.config.sft import SftConfig
from stepaudio_train.models.step1.attention import build_attention_bias
from stepaudio_train.models.step1.lora import add_adapters
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import num_parameters
from stepaudio_train.training.plan import StagePlan, plan_run
from stepaudio_train.training.plan_activations import kept_bytes, layer_activation_bytes, offloaded_bytes
from stepaudio_train.training.plan_remedies import remedies

ROOT = Path(__file__).resolve().parents[3]
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
# Of the default model: all weights, the embedding (as large as the head), and what is neither nor a norm.
ALL, EMBEDDING, NORMS = 3_012_000, 5760 * 160, (2 * 4 + 1) * 160


def configured(*overrides: str) -> PretrainConfig:
    return load_config("pretrain", PretrainConfig, overrides)


def fine_tuning(*overrides: str) -> SftConfig:
    return load_config("sft", SftConfig, overrides)


def only_stage(config: RunConfig, world_size: int) -> StagePlan:
    (stage,) = plan_run(config, world_size).stages
    return stage


def deepspeed(*overrides: str) -> PretrainConfig:
    return configured("engine=deepspeed", "engine.precision=bf16", "training.micro_batch_rows=1", *overrides)


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
    local = only_stage(configured(), 1)
    assert (local.weights, local.gradients, local.optimizer) == (4 * ALL, 4 * ALL, 8 * ALL)


def test_adapters_alone_are_trained():
    # Rank 2 on q and down of 4 layers of hidden size 160 and inner size 448.
    lora = ("lora.rank=2", "lora.targets=[q_proj,down_proj]")
    adapters = 4 * 2 * (160 + 160 + 448 + 160)
    for precision, size in (("fp32", 4), ("bf16", 2)):
        stage = only_stage(configured(f"engine.precision={precision}", *lora), 1)
        assert stage.weights == size * ALL + 4 * adapters
        assert (stage.gradients, stage.optimizer) == (4 * adapters, 8 * adapters)
    # DeepSpeed turns the adapters into bf16 too, and keeps masters of them.
    stage = only_stage(deepspeed("engine.zero_stage=2", *lora), 4)
    assert stage.weights == 2 * (ALL + adapters)
    assert (stage.gradients, stage.optimizer) == (4 * adapters // 4, 12 * adapters // 4)


@pytest.mark.parametrize(
    ("zero_stage", "offload", "weights", "gradients", "optimizer", "host"),
    [
        # Over 4 ranks, bytes a parameter. Stage 1 adds up all gradients in fp32 beside the backward's own.
        (1, "none", 2, 4 + 2, 12 / 4, 0),
        (2, "none", 2, 4 / 4, 12 / 4, 0),
        (3, "none", 2 / 4, 4 / 4, 12 / 4, 0),
        # In host memory: masters and moments, gradients, and weights on their way back.
        (2, "optimizer", 2, 4 / 4, 0, (12 + 4 + 2) / 4),
        # Stage 3 adds gradients up there, and copies them for the update.
        (3, "optimizer", 2 / 4, 0, 0, (12 + 4 + 4) / 4),
        (3, "all", 0, 0, 0, (12 + 4 + 4 + 2) / 4),
    ],
)
def test_bytes_per_parameter_of_zero(zero_stage, offload, weights, gradients, optimizer, host):
    stage = only_stage(deepspeed(f"engine.zero_stage={zero_stage}", f"engine.offload={offload}"), 4)
    assert (stage.weights, stage.gradients, stage.optimizer) == (weights * ALL, gradients * ALL, optimizer * ALL)
    staging = 2 * EMBEDDING if (zero_stage, offload) == (2, "optimizer") else 0
    assert stage.host == host * ALL + staging


def test_buckets_of_zero():
    bucket = "engine.extra.zero_optimization.reduce_bucket_size=2000000"
    # Stage 2 on a GPU: two buckets in bf16, and what is in one of them in fp32 on its way.
    assert only_stage(deepspeed("engine.zero_stage=2", bucket), 4).buffers == 2_000_000 * (2 * 2 + 4)
    # Stage 3: one in fp32 and its copy; this small a model is gathered whole.
    assert only_stage(deepspeed("engine.zero_stage=3", bucket), 4).buffers == 2_000_000 * (4 + 4) + 2 * ALL
    # A tensor over the bucket's size is reduced by itself.
    small = "engine.extra.zero_optimization.reduce_bucket_size=500000"
    alone = only_stage(deepspeed("engine.zero_stage=2", small), 4).buffers
    assert alone == 500_000 * 2 * 2 + EMBEDDING * (2 + 4)


def test_gathered_weights_of_a_large_model_are_a_part():
    config = fine_tuning("experiment=sft_3b_zero3")
    stage = only_stage(config, 8)
    assert 2 * 500_000_000 < stage.buffers < 2 * stage.parameters


def test_earlier_stages_keep_more_micro_batches():
    config = configured(*LARGE)
    kept = [kept_bytes(config, stage, 64) for stage in range(8)]
    assert kept == [(8 - stage) * kept[7] for stage in range(8)]
    # With 4 micro-batches a step there are never more than 4 in flight.
    assert [kept_bytes(config, stage, 4) for stage in range(8)] == [*[4 * kept[7]] * 4, *kept[4:]]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("engine", "precision"), [("local", "fp32"), ("local", "bf16"), ("deepspeed", "fp32"), ("deepspeed", "bf16")]
)
def test_activations_are_what_a_backward_keeps(engine: str, precision: str, lora: LoraConfig | None):
    overrides = (
        f"engine={engine}",
        "engine.device=cpu",
        f"engine.precision={precision}",
        "training.micro_batch_rows=2",
    )
    config = configured(*overrides, "training.sequence_length=96", "model.hidden_size=256")
    config = replace(config, lora=lora)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = Step1ForCausalLM(config.model)
    if lora is not None:
        add_adapters(model, lora)
    # As the engines keep them: locally under autocast, and only what is not trained in bf16.
    mixed = (engine, precision) == ("local", "bf16")
    for parameter in model.parameters():
        if not (mixed and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)
    residual = torch.float32 if mixed and lora is None else dtype
    layer = model.model.layers[0]
    documents = torch.arange(96).div(24, rounding_mode="floor").expand(2, 96)
    bias = build_attention_bias(documents, model.model.slopes, dtype)
    assert bias.backend == "documents"
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(2, 96, 256, dtype=residual, requires_grad=True)
    autocast = torch.autocast("cpu", dtype, enabled=mixed)
    with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x, bias, None)
    # Weights (and autocast's copies of them, transposed or not) and the bias are counted elsewhere.
    weights = {p.numel() for p in layer.parameters()}
    measured = sum(
        t.untyped_storage().nbytes()
        for t in kept.values()
        if t.untyped_storage().nbytes() // t.element_size() not in weights and t.ndim < 5 and 24 not in t.shape[-1:]
    )
    assert layer_activation_bytes(config) == pytest.approx(measured, rel=0.03)


def test_full_recomputation_keeps_little():
    config = configured(*LARGE)
    full = replace(config, engine=replace(config.engine, recompute="full"))
    assert plan_run(full, 512).stages[0].activations < plan_run(config, 512).stages[0].activations / 5


def test_offloaded_layer_inputs_move_to_the_host():
    config = configured(*LARGE)
    full, offload = (replace(config, engine=replace(config.engine, recompute=kind)) for kind in ("full", "offload"))
    moved = offloaded_bytes(offload, 0, 64)
    # Of the first stage: 8 micro-batches in flight, 11 layers each, 8,192 tokens of 12,288 bf16 numbers over 8 ranks.
    assert moved == 8 * 11 * 8192 * 12288 * 2 // 8
    assert kept_bytes(full, 0, 64) - kept_bytes(offload, 0, 64) == moved
    assert plan_run(offload, 512).stages[0].host == moved and plan_run(full, 512).stages[0].host == 0


def test_context_parallelism_cuts_tokens_and_adam_and_keeps_all_keys():
    config = configured(*LARGE)
    cut = replace(config, engine=replace(config.engine, context_parallel=2))
    # Half the tokens of everything, and keys and values of all of them: 8 groups of 96 over 8 ranks.
    model, size = config.model, 2
    keys = 2 * model.num_attention_groups * model.head_dim * 8192 * size // 8
    assert layer_activation_bytes(cut) == layer_activation_bytes(config) // 2 + keys
    # As many replicas on twice the ranks, each of which has half of Adam's states.
    alone, both = plan_run(config, 512).stages[0], plan_run(cut, 1024).stages[0]
    assert plan_run(cut, 1024).data_parallel == plan_run(config, 512).data_parallel
    assert both.weights == alone.weights and both.optimizer == pytest.approx(alone.optimizer / 2)


def test_interleaving_costs_activations():
    config = configured(*LARGE)
    virtual = replace(config, engine=replace(config.engine, virtual_pipeline=11))
    # Stage 0 of 8: 8 whole stages under 1F1B; 2 * 7 + 10 * 8 + 1 chunks of an eleventh under the interleaved one.
    assert [kept_bytes(c, 0, 64) / layer_activation_bytes(config) for c in (config, virtual)] == [88, 95]


def test_gradients_of_a_single_micro_batch_take_the_place_of_activations():
    single = configured("training.micro_batch_rows=8", "training.sequence_length=512")
    several = replace(single, training=replace(single.training, global_batch_rows=16))
    found = only_stage(single, 1)
    assert only_stage(several, 1).activations - found.activations == found.gradients


def test_remedies_fit_and_are_what_they_say():
    config = configured(*LARGE)
    found = remedies(config, 512, 40 * GIB)
    assert found
    for remedy in found:
        changed = configured(*LARGE, *remedy.overrides)
        assert plan_run(changed, remedy.world_size).peak == remedy.peak <= 40 * GIB
    assert remedies(config, 512, 1 * GIB) == []


def test_remedies_of_fine_tuning_begin_with_the_fewest_changes():
    config = fine_tuning("model=step1_3b")
    found = remedies(config, 1, 24 * GIB)
    assert found[0].overrides == ("lora.rank=16",) or "lora.rank=16" in found[0].overrides
    ways = set()
    for remedy in found:
        changed = fine_tuning("model=step1_3b", *remedy.overrides)
        started = replace(changed, model=replace(changed.model, init="DIR"))
        assert layout_problems(started, remedy.world_size) == []
        plan = plan_run(changed, remedy.world_size)
        assert (plan.peak, plan.host) == (remedy.peak, remedy.host) and plan.peak <= 24 * GIB
        ways.add((changed.engine.name, changed.lora is not None))
    assert {("local", True), ("deepspeed", False), ("megatron", False)} <= ways


def test_remedies_keep_to_the_engine_that_has_fields_of_its_own():
    config = fine_tuning("experiment=sft_3b_zero3", "engine.extra.zero_optimization.reduce_bucket_size=100000000")
    found = remedies(config, 8, 16 * GIB)
    assert found
    assert all(not override.startswith("engine.name") for remedy in found for override in remedy.overrides)


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


def test_command_plans_fine_tuning_without_data_or_weights(capsys):
    assert main(["plan", "--recipe", "sft", "experiment=sft_3b_lora", "--memory-gib", "80"]) == 0
    assert "host" not in capsys.readouterr().out
    offloaded = ["experiment=sft_3b_zero3", "engine.offload=optimizer"]
    assert main(["plan", "--recipe", "sft", *offloaded, "--world-size", "8"]) == 0
    out = capsys.readouterr().out
    assert "host" in out and "buffers" in out


def test_policies_are_planned_with_the_models_around_them(capsys):
    """In fp32 a critic has weights, gradients and two moments; two judges and what draws answers have weights alone."""
    typed = ["engine.device=cpu", "engine.precision=fp32", "rollout.max_new_tokens=64", "training.sequence_length=128"]
    ppo = load_config("ppo", PpoRunConfig, [*typed, "reward.model=DIR"])
    plan, each = plan_run(ppo, 1), num_parameters(ppo.model)
    assert plan.micro_batches == 64 and plan.stages[0].models == (4 + 4 + 8 + 3 * 4) * each
    grpo = load_config("grpo", GrpoRunConfig, [*typed, "rollout.server=http://HOST:8000"])
    assert only_stage(grpo, 1).models == 4 * each
    assert only_stage(replace(grpo, lora=LoraConfig()), 1).models == 0
    cut = replace(grpo, engine=replace(grpo.engine, name="deepspeed", zero_stage=3))
    assert only_stage(cut, 4).models == 4 * -(-each // 4)
    assert main(["plan", "--recipe", "ppo", *typed]) == 0 and "models" in capsys.readouterr().out
    assert main(["plan", "--recipe", "grpo", "--gpus", "8"]) == 2
    assert "not what drawing answers does" in capsys.readouterr().err


def test_command_needs_only_a_model_for_its_shapes(tmp_path):
    shapes = tmp_path / "shapes.json"
    assert main(["plan", "--parameters-json", str(shapes), "model=step1_3b", "vocabulary=released"]) == 0
    assert json.loads(shapes.read_text())["model.embed_tokens.weight"] == [74752, 3072]


def test_the_table_in_the_documentation_is_what_is_planned():
    lines = (ROOT / "docs/fine_tuning.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines if line.startswith("| `experiment=")]
    assert len(rows) > 5
    for typed, ranks, *told in rows:
        plan = plan_run(fine_tuning(*typed.split("`")[1].split()), int(ranks))
        host = f"{plan.host / GIB:.1f}" if plan.host else "-"
        fits = ["yes" if plan.peak <= gib * GIB else "no" for gib in (80, 24)]
        assert told == [f"{plan.peak / GIB:.1f}", host, *fits], (ranks, typed)


def test_impossible_layouts_are_refused(capsys):
    assert main(["plan", *LARGE, "--world-size", "100", "training.sequence_length=8191"]) == 2
    errors = capsys.readouterr().err
    assert "must divide the number of" in errors and "training.sequence_length=8191" in errors


def test_planned_peaks_are_what_training_takes(tmp_path):
    """One micro-batch a step, where gradients come after the activations; and several, recomputed."""
    results = tmp_path / "results.json"
    sizes = ["model.hidden_size=512", "model.intermediate_size=1408", "model.num_hidden_layers=4"]
    command = [sys.executable, str(ROOT / "benchmarks/memory.py"), *sizes, "training.sequence_length=256"]
    command += ["--json", str(results), "--only", "one micro-batch", "fp32, recompute"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert finished.returncode == 0, finished.stdout
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["planned / measured"] == pytest.approx(1, abs=0.12), row
