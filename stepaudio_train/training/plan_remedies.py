"""What to change so that a run fits the memory there is: layouts that are tried, and those that do it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from stepaudio_train.config.checks import layout_problems
from stepaudio_train.config.schema import LoraConfig, PretrainConfig, RunConfig
from stepaudio_train.config.sft import SftConfig
from stepaudio_train.training.plan import plan_run

_TENSOR_PARALLEL = (1, 2, 4, 8)
"""Tensor parallelism beyond the GPUs of one machine is slow, so none is proposed."""
_CONTEXT_PARALLEL = (1, 2, 4, 8)
_MORE_RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Remedy:
    """A change of the configuration after which the run fits."""

    overrides: tuple[str, ...]
    """What to type."""
    world_size: int
    peak: int
    """Bytes of the fullest rank then."""
    host: int
    """Bytes of host memory for each rank then."""


def remedies(config: RunConfig, world_size: int, memory_bytes: float) -> list[Remedy]:
    """Changes that make a run fit, those with the fewest first: the best of each way (the engine as it is, adapters,
    DeepSpeed, Megatron-Core).

    Empty if nothing that is tried fits (TP and CP up to 8, PP up to the number of layers, ranks up to 8 times as many,
    one row a micro-batch).
    """
    found: dict[tuple[Any, ...], Remedy] = {}
    for changed, ranks in _by_changes(config, world_size):
        way = (changed.engine.name, changed.lora is None)
        if way not in found:
            plan = plan_run(changed, ranks)
            if plan.peak <= memory_bytes:
                found[way] = Remedy(overrides_between(config, changed), ranks, plan.peak, plan.host)
    return list(found.values())


def _by_changes(config: RunConfig, world_size: int) -> list[tuple[RunConfig, int]]:
    """Valid candidates: fewest things to type first, then the fewest ranks."""

    def effort(candidate: tuple[RunConfig, int]) -> tuple[int, int]:
        changed, ranks = candidate
        return len(overrides_between(config, changed)) + (ranks != world_size), ranks

    return sorted(_candidates(config, world_size), key=effort)


def _candidates(config: RunConfig, world_size: int) -> Iterator[tuple[RunConfig, int]]:
    for engine_fields, ranks in _engines(config, world_size):
        recomputes = dict.fromkeys((config.engine.recompute, "full", "offload"))
        for lora, recompute, micro in product(_adapters(config), recomputes, {config.training.micro_batch_rows, 1}):
            changed = replace(
                config,
                engine=replace(config.engine, recompute=recompute, **engine_fields),
                lora=lora,
                training=replace(config.training, micro_batch_rows=micro),
            )
            # Adapters need weights to adapt; which ones does not matter here.
            started = replace(changed, model=replace(changed.model, init=changed.model.init or "DIR"))
            if not layout_problems(started, ranks):
                yield changed, ranks


def _adapters(config: RunConfig) -> list[LoraConfig | None]:
    """Pretraining has no weights to adapt."""
    return [None, LoraConfig()] if config.lora is None and isinstance(config, SftConfig) else [config.lora]


def _engines(config: RunConfig, world_size: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Fields of `engine` and the number of ranks, the engine as it is among them."""
    engine = config.engine
    # Fields that are one engine's own would be refused by another.
    names = (engine.name,) if engine.extra else ("local", "deepspeed", "megatron")
    if engine.name == "local":
        yield {}, world_size
    if "deepspeed" in names:
        stages = [stage for stage in (1, 2, 3) if engine.name != "deepspeed" or stage >= engine.zero_stage]
        offloads = {"none": ("none", "optimizer", "all"), "optimizer": ("optimizer", "all"), "all": ("all",)}
        alone = {"tensor_parallel": 1, "context_parallel": 1, "pipeline_parallel": 1, "virtual_pipeline": 1}
        for stage, offload, more in product(stages, offloads[engine.offload], _MORE_RANKS):
            yield {"name": "deepspeed", "zero_stage": stage, "offload": offload, **alone}, world_size * more
    if "megatron" in names:
        layers = config.model.num_hidden_layers
        pipelines = [stages for stages in range(1, layers + 1) if layers % stages == 0]
        for tp, cp, pp in product(_TENSOR_PARALLEL, _CONTEXT_PARALLEL, pipelines):
            virtual = engine.virtual_pipeline if pp == engine.pipeline_parallel else 1
            fields = {
                "tensor_parallel": tp,
                "context_parallel": cp,
                "pipeline_parallel": pp,
                "virtual_pipeline": virtual,
            }
            replica = tp * cp * pp
            for ranks in {-(-world_size // replica) * replica, *(world_size * more for more in _MORE_RANKS)}:
                yield {"name": "megatron", "offload": "none", **fields}, ranks


def overrides_between(before: RunConfig, after: RunConfig) -> tuple[str, ...]:
    """What to type to turn one layout of a run into another."""
    old, new = vars(before.engine), vars(after.engine)
    typed = [f"engine.{key}={new[key]}" for key in old if old[key] != new[key] and key != "extra"]
    if before.training.micro_batch_rows != after.training.micro_batch_rows:
        typed.append(f"training.micro_batch_rows={after.training.micro_batch_rows}")
    streams = [config.data.num_streams for config in (before, after) if isinstance(config, PretrainConfig)]
    if len(set(streams)) > 1:
        typed.append(f"data.num_streams={streams[1]}")
    if before.lora is None and after.lora is not None:
        typed.append(f"lora.rank={after.lora.rank}")
    return tuple(typed)
