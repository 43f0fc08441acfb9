"""The fastest layouts of a model on a cluster, among those that the Megatron-Core engine can run and that fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product

from stepaudio_train.config.checks import data_parallel_size, layout_problems
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.gpus import Gpu
from stepaudio_train.config.schema import PretrainConfig, RunConfig, Step1Config
from stepaudio_train.training.planner.calibration import FITTED
from stepaudio_train.training.planner.cost import Layout, ModelSizes, StepTime, step_time

_MICRO_ROWS = (1, 2, 4, 8)
_CONTEXT = (2, 4, 8)
_FLEX_SHARE = 0.58
"""FlexAttention's Triton kernel beside cuDNN, forward, heads of 128, 8,192 tokens, no mask: 402 TFLOP/s
(pytorch/benchmark pull request 2443) of 691 (NVIDIA/cudnn-frontend 3929da2)."""
_CHECKPOINT_BYTES = 14
"""A weight's: bf16, and in fp32 its master and Adam's two moments."""


@dataclass(frozen=True)
class Cluster:
    """What a run has."""

    gpu: Gpu
    gpus: int
    memory_gib: float
    """Of a GPU."""


@dataclass(frozen=True)
class Candidate:
    """A layout and what it is predicted to take."""

    config: RunConfig
    """The run's, with this layout."""
    layout: Layout
    time: StepTime

    @cached_property
    def peak_bytes(self) -> int:
        """Memory of the fullest rank."""
        # Only now: it brings in torch, which takes seconds.
        from stepaudio_train.training.plan import plan_run

        return plan_run(self.config, self.layout.gpus).peak

    @property
    def tokens_per_s(self) -> float:
        return self.layout.step_tokens / self.time.total_s

    def flops_utilisation(self, gpu: Gpu) -> float:
        """MFU: model FLOPs, causal over documents, of what the data sheet promises."""
        length = self.layout.document_tokens or self.layout.sequence_length
        flops = model_sizes(self.config.model).step_flops(self.layout.step_tokens, length)
        return flops / self.time.total_s / self.layout.gpus / gpu.flops_per_s

    def as_published(self, gpu: Gpu) -> StepTime:
        """The same layout with what the published runs have and the engine has not: TP's collectives cut up to run
        beside the matmuls, CP's in a ring behind attention, cuDNN's rate of attention, gradients reduced in bf16."""
        layout = replace(self.layout, overlaps_tp=True, overlaps_cp=True, attention_share=1.0, gradient_bytes=2)
        return step_time(model_sizes(self.config.model), layout, gpu, FITTED)


@dataclass(frozen=True)
class Found:
    """What a search found, fastest first."""

    best: tuple[Candidate, ...]
    """Those that fit: the best of each TP, CP and PP."""
    too_large: tuple[Candidate, ...]
    """Faster than the best one, but too large: of each TP, CP and PP the smallest, the smallest first."""
    tried: int


def search(config: RunConfig, cluster: Cluster, document_tokens: int | None = None) -> Found:
    """Layouts of `config` on all GPUs of `cluster`.

    TP up to the GPUs of a machine, CP up to 8, all pipelines that divide the layers and all ways to interleave them,
    micro-batches of 1, 2, 4 and 8 rows (with CP, of 1: two ranks compute a row each more cheaply than two rows
    together), no recomputation or full. Selective recomputation, which frees nothing where attention keeps no scores,
    is not tried, and neither is offloading, whose time is not in the cost model.

    Raises:
        ConfigError: there is no layout that the engine takes, whatever its memory.
    """
    candidates = _candidates(config, cluster, document_tokens)
    groups: dict[tuple[int, int, int], list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.time.total_s):
        layout = candidate.layout
        groups.setdefault((layout.tp, layout.cp, layout.pp), []).append(candidate)
    limit = cluster.memory_gib * 2**30
    fitting = [next((c for c in group if c.peak_bytes <= limit), None) for group in groups.values()]
    best = sorted((c for c in fitting if c is not None), key=lambda candidate: candidate.time.total_s)
    best_s = best[0].time.total_s if best else math.inf
    too_large = [
        min(faster, key=lambda candidate: candidate.peak_bytes)
        for group in groups.values()
        if (faster := [c for c in group if c.time.total_s < best_s and c.peak_bytes > limit])
    ]
    return Found(tuple(best), tuple(sorted(too_large, key=lambda candidate: candidate.peak_bytes)), len(candidates))


def model_sizes(model: Step1Config) -> ModelSizes:
    """What the cost model needs of a model."""
    return ModelSizes(
        hidden=model.hidden_size,
        inner=model.intermediate_size,
        layers=model.num_hidden_layers,
        heads=model.num_attention_heads,
        groups=model.num_attention_groups,
        vocab=model.vocab_size,
    )


def engine_layout(config: RunConfig, gpus: int, document_tokens: int | None = None) -> Layout:
    """How the Megatron-Core engine runs `config`: TP's collectives are not cut up, CP gathers keys and values before
    attention, the interleaved schedule hides sends, gradients are reduced in fp32, and FlexAttention computes
    attention."""
    engine, training = config.engine, config.training
    dp = data_parallel_size(config, gpus)
    return Layout(
        sequence_length=training.sequence_length,
        tp=engine.tensor_parallel,
        cp=engine.context_parallel,
        pp=engine.pipeline_parallel,
        vp=engine.virtual_pipeline,
        dp=dp,
        micro_rows=training.micro_batch_rows,
        micro_batches=training.global_batch_rows // (dp * training.micro_batch_rows),
        recompute=engine.recompute,
        document_tokens=document_tokens,
        overlaps_tp=False,
        overlaps_cp=False,
        gradient_bytes=4,
        attention_share=_FLEX_SHARE,
    )


def slower_by(candidate: Candidate, best: Candidate) -> dict[str, float]:
    """Seconds of a step that each part takes more than in `best`, the largest first."""
    parts = {part.name.removesuffix("_s"): part.name for part in fields(StepTime)}
    more = {name: getattr(candidate.time, field) - getattr(best.time, field) for name, field in parts.items()}
    return dict(sorted(more.items(), key=lambda item: -item[1]))


def checkpoint_s(config: RunConfig, bytes_per_s: float) -> float:
    """Seconds that a checkpoint takes to write, weights and optimizer, at the storage's rate."""
    model = model_sizes(config.model)
    weights = model.layers * model.layer_weights + 2 * model.hidden * model.vocab
    return _CHECKPOINT_BYTES * weights / bytes_per_s


def training_days(candidate: Candidate, tokens: float, checkpoint_seconds: float) -> float:
    """Days for `tokens`; checkpoints that are not written behind the training stop it."""
    training = candidate.config.training
    steps = tokens / candidate.layout.step_tokens
    stops = steps / training.checkpoint_every if training.checkpoint_every and not training.async_checkpoint else 0
    return (steps * candidate.time.total_s + stops * checkpoint_seconds) / 86400


def _candidates(config: RunConfig, cluster: Cluster, document_tokens: int | None) -> list[Candidate]:
    found: list[Candidate] = []
    refusals: list[tuple[int, int, list[str]]] = []
    for changed in _layouts(config, cluster):
        problems = layout_problems(changed, cluster.gpus)
        if problems:
            rows = data_parallel_size(changed, cluster.gpus) * changed.training.micro_batch_rows
            refusals.append((len(problems), rows, problems))
            continue
        layout = engine_layout(changed, cluster.gpus, document_tokens)
        time = step_time(model_sizes(changed.model), layout, cluster.gpu, FITTED)
        found.append(Candidate(changed, layout, time))
    if not found:
        # The one with the fewest problems, and the fewest rows to ask for.
        raise ConfigError(min(refusals)[2])
    return found


def _layouts(config: RunConfig, cluster: Cluster) -> Iterator[RunConfig]:
    layers = config.model.num_hidden_layers
    tensor = [tp for tp in (1, 2, 4, 8) if tp <= cluster.gpu.gpus_per_machine]
    rows = [(1, micro_rows) for micro_rows in _MICRO_ROWS] + [(cp, 1) for cp in _CONTEXT]
    for tp, (cp, micro_rows), pp, recompute in product(tensor, rows, _divisors(layers), ("none", "full")):
        if cluster.gpus % (tp * cp * pp):
            continue
        for vp in _divisors(layers // pp) if pp > 1 else [1]:
            engine = replace(
                config.engine,
                name="megatron",
                device="auto",
                precision="bf16",
                tensor_parallel=tp,
                context_parallel=cp,
                pipeline_parallel=pp,
                virtual_pipeline=vp,
                recompute=recompute,
                distributed_optimizer=True,
                offload="none",
            )
            training = replace(config.training, micro_batch_rows=micro_rows)
            yield _with_streams(replace(config, engine=engine, training=training), cluster.gpus)


def _with_streams(config: RunConfig, gpus: int) -> RunConfig:
    """As many sample streams as the replicas can share, if those that are set are not."""
    if not isinstance(config, PretrainConfig):
        return config
    dp, rows = data_parallel_size(config, gpus), config.training.global_batch_rows
    wanted = (config.data.num_streams, math.lcm(config.data.num_streams, dp), dp)
    streams = next((n for n in wanted if n % dp == 0 and rows % n == 0), config.data.num_streams)
    return replace(config, data=replace(config.data, num_streams=streams))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
