"""Memory that a pretraining run needs on each rank, from its configuration alone.

Counted, in bytes a rank (p: parameters it holds; dp: data-parallel size):

    weights     megatron bf16 2p, fp32 4p; local 4p, and 2p more for autocast's copies
    gradients   4p: they are added up in fp32 whatever the weights are
    optimizer   Adam's two moments 8p, and in bf16 the fp32 master weights 4p; both / dp with the distributed optimizer
    activations what the backward needs, per token and layer (h: hidden, k: key/value width, i: inner width, t: TP):
                the two norms' inputs and outputs 4h/t, queries, keys and values (h + 2k)/t, the attention's output
                h/t, gate, up and their product 3i/t; times the bytes of the compute type. This is the accounting of
                Korthikanti et al. 2022 (arXiv 2205.05198) with sequence parallelism, without dropout and without
                stored attention scores. What is not fused is kept too: silu(gate) i/t but for megatron on a GPU, and
                on CPU the normalised inputs 2h/t. Autocast keeps the residual stream in fp32 and casts anew for every
                matrix. Full recomputation keeps each layer's input h/t and one layer's activations.
                Times the micro-batches in flight: pp - stage under 1F1B, and (2(pp - stage - 1) + (vp - 1)pp + 1) / vp
                under the interleaved schedule, but no more than there are.
    head        its input, and logits of one chunk of tokens in fp32, twice (last stage)
    bias        rows x heads/t x T x T on CPU, where attention takes it as a tensor
    runtime     an assumed 2 GiB on a GPU for the CUDA context, NCCL's buffers and fragmentation

`engine.device=auto` is planned as a GPU, since one plans on another machine than one trains on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from stepaudio_train.config.checks import data_parallel_size, layout_problems
from stepaudio_train.config.schema import RunConfig, Step1Config
from stepaudio_train.models.step1.weight_map import Entry, Kind, entries, hf_shapes, num_parameters

_RUNTIME_BYTES = 2 * 2**30
_HEAD_CHUNK_TOKENS = 1024
_MAX_TENSOR_PARALLEL = 8
"""Tensor parallelism beyond the GPUs of one machine is slow, so none is proposed."""


@dataclass(frozen=True)
class StagePlan:
    """Bytes that each rank of one pipeline stage needs."""

    stage: int
    parameters: int
    """Held by one rank, vocabulary padding included."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.runtime


@dataclass(frozen=True)
class RunPlan:
    """A run's layout and the memory of its ranks."""

    parameters: int
    """Of the whole model, without padding."""
    world_size: int
    data_parallel: int
    micro_batches: int
    """A step, on one data-parallel rank."""
    stages: tuple[StagePlan, ...]

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.total for stage in self.stages)


@dataclass(frozen=True)
class Remedy:
    """A change of the configuration after which the run fits."""

    overrides: tuple[str, ...]
    """What to type."""
    world_size: int
    peak: int
    """Bytes of the fullest rank then."""


def plan_run(config: RunConfig, world_size: int) -> RunPlan:
    """Memory of every pipeline stage of `config` over `world_size` ranks. The layout must be valid."""
    dp = data_parallel_size(config, world_size)
    micro_batches = config.training.global_batch_rows // (dp * config.training.micro_batch_rows)
    stages = tuple(_plan_stage(config, stage, dp, micro_batches) for stage in range(config.engine.pipeline_parallel))
    return RunPlan(num_parameters(config.model), world_size, dp, micro_batches, stages)


def remedies(config: RunConfig, world_size: int, memory_bytes: float) -> list[Remedy]:
    """Changes that make a run fit: the fewest ranks a model replica that can do it, without and with recomputation.

    Empty if nothing that is tried fits (TP up to 8, PP up to the number of layers, one row a micro-batch).
    """
    found: list[Remedy] = []
    for recompute in dict.fromkeys((config.engine.recompute, "full")):
        for changed, ranks in _candidates(config, world_size, recompute):
            peak = plan_run(changed, ranks).peak
            if peak <= memory_bytes:
                found.append(Remedy(_overrides(config, changed), ranks, peak))
                break
    return found


def _plan_stage(config: RunConfig, stage: int, dp: int, micro_batches: int) -> StagePlan:
    engine = config.engine
    parameters = _stage_parameters(config, stage)
    bf16 = _compute_bytes(config) == 2
    master = 4 if bf16 and engine.name == "megatron" else 0
    weight_bytes = 2 if master else 6 if bf16 else 4
    sharded = dp if engine.name == "megatron" and engine.distributed_optimizer else 1
    return StagePlan(
        stage=stage,
        parameters=parameters,
        weights=parameters * weight_bytes,
        gradients=parameters * 4,
        optimizer=-(-parameters * (8 + master) // sharded),
        activations=_stage_activations(config, stage, micro_batches),
        runtime=0 if engine.device == "cpu" else _RUNTIME_BYTES,
    )


def _stage_parameters(config: RunConfig, stage: int) -> int:
    model, pp = config.model, config.engine.pipeline_parallel
    table = entries(model)
    per_layer = sum(_held(config, entry) for name, entry in table.items() if name.startswith("decoder.layers.0."))
    total = per_layer * (model.num_hidden_layers // pp)
    outside = [entry for name, entry in table.items() if not name.startswith("decoder.layers.")]
    for entry in outside:
        is_embedding = entry.megatron.startswith("embedding.")
        if (stage == 0 and is_embedding) or (stage == pp - 1 and not is_embedding):
            total += _held(config, entry)
    return total


def _held(config: RunConfig, entry: Entry) -> int:
    """Parameters of one Megatron tensor that a tensor-parallel rank holds."""
    tp = config.engine.tensor_parallel
    shapes = _shapes(config.model)
    if entry.kind is Kind.VOCAB:
        rows, width = shapes[entry.hf[0]]
        return math.ceil(rows / tp) * width
    whole = sum(math.prod(shapes[name]) for name in entry.hf)
    return whole if entry.kind is Kind.REPLICATED else whole // tp


@lru_cache(maxsize=8)
def _shapes(model: Step1Config) -> dict[str, tuple[int, ...]]:
    return hf_shapes(model)


def _stage_activations(config: RunConfig, stage: int, micro_batches: int) -> int:
    model, engine, training = config.model, config.engine, config.training
    tp, pp, vp = engine.tensor_parallel, engine.pipeline_parallel, engine.virtual_pipeline
    tokens = training.micro_batch_rows * training.sequence_length
    size = _compute_bytes(config)
    layer = layer_activation_bytes(config)
    kept = tokens * size * model.hidden_size // tp if engine.recompute == "full" else layer
    chunks = micro_batches * vp
    in_flight = pp - stage if vp == 1 else 2 * (pp - stage - 1) + (vp - 1) * pp + 1
    total = min(chunks, in_flight) * (model.num_hidden_layers // (pp * vp)) * kept
    total += layer if engine.recompute == "full" else 0
    if stage == pp - 1:
        total += tokens * model.hidden_size * size
        total += 2 * 4 * min(tokens, _HEAD_CHUNK_TOKENS) * math.ceil(model.vocab_size / tp)
    if engine.device == "cpu":
        heads = model.num_attention_heads // tp
        total += training.micro_batch_rows * heads * training.sequence_length**2 * size
    return total


def layer_activation_bytes(config: RunConfig) -> int:
    """What one layer of one rank keeps of a micro-batch for its backward, without recomputation."""
    model, engine = config.model, config.engine
    h, kv, inner = model.hidden_size, model.num_attention_groups * model.head_dim, model.intermediate_size
    tokens = config.training.micro_batch_rows * config.training.sequence_length
    norms = 2 * h if engine.device == "cpu" else 0
    size = _compute_bytes(config)
    if engine.name == "local" and size == 2:
        return tokens * (4 * (2 * h + norms) + 2 * (7 * h + 2 * kv + 4 * inner))
    unfused = inner if engine.device == "cpu" or engine.name == "local" else 0
    elements = 6 * h + 2 * kv + 3 * inner + norms + unfused
    return tokens * size * elements // engine.tensor_parallel


def _compute_bytes(config: RunConfig) -> int:
    """Bytes of a number in the forward. `auto` is planned as bf16, which every GPU that can hold this does, but on
    CPU as fp32."""
    precision = config.engine.precision
    if precision == "auto":
        precision = "fp32" if config.engine.device == "cpu" else "bf16"
    return 4 if precision == "fp32" else 2


def _candidates(config: RunConfig, world_size: int, recompute: str) -> Iterator[tuple[RunConfig, int]]:
    """Valid layouts and their world size: the smallest model replica first, tensor before pipeline parallelism."""
    rows = sorted({config.training.micro_batch_rows, 1}, reverse=True)
    tensor = [2**n for n in range(int(math.log2(_MAX_TENSOR_PARALLEL)) + 1)]
    pipeline = [n for n in range(1, config.model.num_hidden_layers + 1) if config.model.num_hidden_layers % n == 0]
    layouts = [(-(-world_size // (tp * pp)) * tp * pp, tp, pp) for tp in tensor for pp in pipeline]
    # Those that the ranks at hand can hold come first.
    for ranks, tp, pp in sorted(layouts, key=lambda x: (x[0] != world_size, x[1] * x[2], x[2])):
        virtual = config.engine.virtual_pipeline if pp == config.engine.pipeline_parallel else 1
        name = "megatron" if tp * pp > 1 else config.engine.name
        for micro in rows:
            changed = replace(
                config,
                engine=replace(
                    config.engine,
                    name=name,
                    tensor_parallel=tp,
                    pipeline_parallel=pp,
                    virtual_pipeline=virtual,
                    recompute=recompute,
                ),
                training=replace(config.training, micro_batch_rows=micro),
            )
            if not layout_problems(changed, ranks):
                yield changed, ranks


def _overrides(before: RunConfig, after: RunConfig) -> tuple[str, ...]:
    pairs = [
        ("engine", before.engine.name, after.engine.name),
        *(
            (f"engine.{key}", getattr(before.engine, key), getattr(after.engine, key))
            for key in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "recompute")
        ),
        ("training.micro_batch_rows", before.training.micro_batch_rows, after.training.micro_batch_rows),
    ]
    return tuple(f"{key}={new}" for key, old, new in pairs if old != new)
