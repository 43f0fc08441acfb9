"""What `stepaudio plan` counts whatever the batch: weights, gradients, optimizer, buffers, and host memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from stepaudio_train.config.checks import data_parallel_size
from stepaudio_train.config.schema import RunConfig, Step1Config
from stepaudio_train.engines.deepspeed.settings import deepspeed_config
from stepaudio_train.models.step1.lora import adapter_shapes
from stepaudio_train.models.step1.weight_map import Entry, Kind, entries, hf_shapes

_REUSE_DISTANCE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance: weights that are needed again within it stay gathered."""
_REDUCED_AT_A_TIME_ELEMENTS = 500_000_000
"""Of BF16_Optimizer's gradients (DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE)."""


@dataclass(frozen=True)
class States:
    """Bytes of one rank, all of its step long unless said otherwise."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int = 0
    """DeepSpeed's: gathered weights, buckets of gradients and what they are reduced in."""
    host: int = 0
    """In the machine's own memory, not the device's: what is offloaded."""
    late_gradients: int = 0
    """Part of `gradients` that only the step's first backward makes."""
    update: int = 0
    """On top for the moment of the update."""


def rank_states(config: RunConfig, stage: int, world_size: int) -> States:
    """States of a rank of one pipeline stage. The layout must be valid."""
    if config.engine.name == "megatron":
        # Ranks that share rows have the same weights, as those of other replicas do.
        return _megatron(config, stage, data_parallel_size(config, world_size) * config.engine.context_parallel)
    if config.engine.name == "local":
        return _local(config)
    return _zero3(config, world_size) if config.engine.zero_stage == 3 else _zero12(config, world_size)


def compute_bytes(config: RunConfig) -> int:
    """Bytes of a number in the forward. `auto` is planned as bf16, which every GPU that can hold this does, but on
    CPU as fp32."""
    precision = config.engine.precision
    if precision == "auto":
        precision = "fp32" if config.engine.device == "cpu" else "bf16"
    return 4 if precision == "fp32" else 2


def is_mixed(config: RunConfig) -> bool:
    """Autocast over fp32 weights, as the local engine computes in bf16."""
    return config.engine.name == "local" and compute_bytes(config) == 2


def base_elements(config: RunConfig, stage: int) -> int:
    """Of the model's own weights that a rank of a stage computes with, vocabulary padding included."""
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


def trained_elements(config: RunConfig, stage: int) -> int:
    """Of the weights that a rank of a stage makes gradients for: the adapters alone where there are any."""
    if config.lora is None:
        return base_elements(config, stage)
    return sum(math.prod(shape) for shape in adapter_shapes(config.model, config.lora).values())


def largest_embedding(config: RunConfig) -> int:
    """Elements of the embedding, or of the head, on a rank: the largest tensors of the model."""
    return math.ceil(config.model.vocab_size / config.engine.tensor_parallel) * config.model.hidden_size


def _local(config: RunConfig) -> States:
    base, trained = base_elements(config, 0), trained_elements(config, 0)
    weights = 4 * base if config.lora is None else compute_bytes(config) * base + 4 * trained
    return States(weights, 4 * trained, 8 * trained, late_gradients=4 * trained, update=4 * _largest_trained(config))


def _megatron(config: RunConfig, stage: int, copies: int) -> States:
    """copies: ranks that hold the same weights."""
    elements, size = base_elements(config, stage), compute_bytes(config)
    master = 4 if size == 2 else 0
    distributed = config.engine.distributed_optimizer
    shards = copies if distributed else 1
    # gloo scatters out of a copy of all gradients.
    on_gloo = distributed and config.engine.device == "cpu"
    return States(
        weights=size * elements,
        gradients=4 * elements,
        optimizer=-(-elements * (8 + master) // shards),
        update=4 * (elements if on_gloo else min(largest_embedding(config), elements // shards)),
    )


def _zero12(config: RunConfig, ranks: int) -> States:
    size, stage = compute_bytes(config), config.engine.zero_stage
    trained, offload = trained_elements(config, 0), config.engine.offload != "none"
    frozen = base_elements(config, 0) if config.lora is not None else 0
    part = -(-trained // ranks)
    weights, optimizer = size * (trained + frozen), 12 * part
    if stage == 1 and size == 2 and not offload:
        # BF16_Optimizer: every rank adds up all gradients in fp32 beside those of the backward.
        reduced = 4 * min(trained, _REDUCED_AT_A_TIME_ELEMENTS)
        return States(weights, 6 * trained, optimizer, late_gradients=2 * trained, update=reduced)
    # Stage 1 cuts its part out of all gradients before the update.
    gradients, update = (4 * trained, 4 * part) if stage == 1 else (4 * part, 0)
    buffers = _bucket_bytes(config, trained, 4 if stage == 1 else size)
    if not offload:
        return States(weights, gradients, optimizer, buffers, late_gradients=gradients, update=update)
    largest = size * _largest_trained(config)
    host = optimizer + (4 + size) * part + largest
    return States(weights, gradients, 0, buffers + largest, host, late_gradients=gradients, update=update)


def _zero3(config: RunConfig, ranks: int) -> States:
    size, offload = compute_bytes(config), config.engine.offload
    trained = trained_elements(config, 0)
    base = base_elements(config, 0)
    frozen = base if config.lora is not None else 0
    part = -(-trained // ranks)
    weights = size * (part + -(-frozen // ranks))
    zero = _zero_settings(config)
    # Those after the middle of the forward that the backward needs soon; then what is fetched ahead.
    near = _REUSE_DISTANCE_ELEMENTS // 2 + zero["stage3_prefetch_bucket_size"]
    gathered = size * min(base + (trained if frozen else 0), near + largest_embedding(config))
    buffers = gathered + _bucket_bytes(config, trained, 4)
    if offload == "none":
        # In fp32 the weights are their own masters. The update is made from a copy of the gradients.
        optimizer = (8 if size == 4 else 12) * part
        return States(weights, 4 * part, optimizer, buffers, update=4 * part)
    host = (4 + 8 + 4 + 4) * part
    if offload == "all":
        return States(0, 0, 0, buffers, host + weights)
    return States(weights, 0, 0, buffers, host)


def _bucket_bytes(config: RunConfig, trained: int, held_bytes: int) -> int:
    """The buckets that gradients are gathered in and reduced from, and their fp32 copies on the way."""
    zero, size = _zero_settings(config), compute_bytes(config)
    bucket, largest = zero["reduce_bucket_size"], _largest_trained(config)
    count = 2 if zero["overlap_comm"] and config.engine.zero_stage < 3 else 1
    # What does not fit into a bucket is reduced by itself.
    reduced = max(min(bucket, trained), largest)
    copies = 4 if config.engine.zero_stage == 3 or size == 2 else 0
    alone = (size + (4 if size == 2 and config.engine.zero_stage == 3 else 0)) * largest if largest > bucket else 0
    return count * bucket * held_bytes + reduced * copies + alone


def _zero_settings(config: RunConfig) -> dict[str, Any]:
    device = torch.device("cpu" if config.engine.device == "cpu" else "cuda")
    dtype = torch.float32 if compute_bytes(config) == 4 else torch.bfloat16
    return deepspeed_config(config, device, dtype)["zero_optimization"]


def _largest_trained(config: RunConfig) -> int:
    if config.lora is None:
        return largest_embedding(config)
    return max(math.prod(shape) for shape in adapter_shapes(config.model, config.lora).values())


def _held(config: RunConfig, entry: Entry) -> int:
    """Elements of one Megatron tensor that a tensor-parallel rank holds."""
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
