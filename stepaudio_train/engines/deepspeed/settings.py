"""DeepSpeed's JSON out of our configuration. Imports no DeepSpeed."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import RunConfig
from stepaudio_train.models.step1.weight_map import num_parameters

_MAX_BUCKET_ELEMENTS = 200_000_000

# Top-level keys of https://www.deepspeed.ai/docs/config-json that make sense here.
_KNOWN = (
    "activation_checkpointing",
    "aio",
    "amp",
    "bf16",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "data_types",
    "disable_allgather",
    "dump_state",
    "eigenvalue",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "sparse_gradients",
    "steps_per_print",
    "timers",
    "torch_autocast",
    "use_node_local_storage",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
# Set by fields of ours, which other parts of the program read too.
_OURS = {
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
    "gradient_accumulation_steps": "training.micro_batch_rows",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "train_batch_size": "training.global_batch_rows",
    "train_micro_batch_size_per_gpu": "training.micro_batch_rows",
}


def deepspeed_config(config: RunConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The JSON that DeepSpeed is started with: ours, and `config.engine.extra` over it, mapping by mapping.

    Raises:
        ConfigError: `extra` names a top-level key that DeepSpeed does not have, or one that another field sets.
    """
    _check_extra(config.engine.extra)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_rows,
        # The engine says which micro-batch is the last, and scales the loss itself. Over 1, or DeepSpeed takes the last
        # micro-batch's gradient for the whole where it keeps gradients in host memory.
        "gradient_accumulation_steps": 2,
        "gradient_clipping": max(0.0, config.optimizer.clip_grad_norm),
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # torch's AdamW runs on every device; DeepSpeed's own for host memory has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config, device),
    }
    return _merged(ours, config.engine.extra)


def _zero(config: RunConfig, device: torch.device) -> dict[str, Any]:
    engine = config.engine
    # DeepSpeed allocates buckets whole, however small the model is, and asks for a multiple of 2.
    bucket = min(_MAX_BUCKET_ELEMENTS, 2 * num_parameters(config.model))
    fields: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": device.type == "cuda",
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
    }
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if engine.offload != "none":
        fields["offload_optimizer"] = host
    if engine.offload == "all":
        fields["offload_param"] = host
    return fields


def _check_extra(extra: dict[str, Any]) -> None:
    problems = []
    for name in extra:
        if name in _OURS:
            problems.append(f"engine.extra.{name}: set {_OURS[name]} instead")
        elif name not in _KNOWN:
            close = difflib.get_close_matches(name, _KNOWN, 1)
            hint = f"; did you mean engine.extra.{close[0]}?" if close else ""
            problems.append(f"engine.extra.{name}: DeepSpeed's configuration has no such key{hint}")
    zero = extra.get("zero_optimization", {})
    if "stage" in zero:
        problems.append("engine.extra.zero_optimization.stage: set engine.zero_stage instead")
    if problems:
        raise ConfigError(problems)


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        before = result.get(key)
        result[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result
