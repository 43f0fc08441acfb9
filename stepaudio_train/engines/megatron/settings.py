"""Megatron-Core's own configurations out of ours."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import RunConfig
from stepaudio_train.engines.megatron.weight_gradients import fuse_accumulation


def transformer_config(config: RunConfig, device: torch.device, dtype: torch.dtype) -> TransformerConfig:
    """The model and its layout. `config.engine.extra` overrides any field.

    Raises:
        ConfigError: `extra` names a field that there is not, or a value that Megatron-Core refuses.
    """
    model, engine = config.model, config.engine
    fields: dict[str, Any] = {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_attention_groups,
        "layernorm_epsilon": model.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": engine.tensor_parallel,
        "sequence_parallel": engine.tensor_parallel > 1,
        "context_parallel_size": engine.context_parallel,
        "pipeline_model_parallel_size": engine.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": engine.virtual_pipeline if engine.virtual_pipeline > 1 else None,
        "pipeline_dtype": dtype,
        # In one batch of sends and receives, an interleaved pipeline of two ranks cannot tell apart what goes to the
        # next stage and what goes to the previous one: both are the same rank.
        "overlap_p2p_comm": engine.virtual_pipeline > 1,
        "batch_p2p_comm": engine.virtual_pipeline == 1,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "transformer_impl": "local",
        "perform_initialization": False,
        "use_cpu_initialization": device.type == "cpu",
        # Its fusions are compiled for the GPU when they are first called.
        "bias_activation_fusion": device.type == "cuda",
        "bias_dropout_fusion": device.type == "cuda",
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": fuse_accumulation(device, dtype),
        # Gradients stay sums over tokens; the engine divides them by the global weight, which may be fractional.
        "calculate_per_token_loss": True,
        # On a CPU a send may still be reading what would be freed; a GPU frees in stream order.
        "deallocate_pipeline_outputs": device.type == "cuda",
        **_recompute_fields(engine.recompute),
    }
    _check_extra(engine.extra)
    try:
        return TransformerConfig(**{**fields, **engine.extra})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError([f"engine.extra={engine.extra}: refused by Megatron-Core: {error}"]) from error


def ddp_config(config: RunConfig, device: torch.device) -> DistributedDataParallelConfig:
    """Gradients are reduced in fp32; on a GPU behind the backward."""
    overlap = device.type == "cuda"
    distributed = config.engine.distributed_optimizer
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed,
    )


def optimizer_config(config: RunConfig, dtype: torch.dtype) -> OptimizerConfig:
    """AdamW. Learning rates and weight decays of the groups are set by `optimizer.AdamW`, clipping by the engine."""
    optimizer = config.optimizer
    distributed = config.engine.distributed_optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )


def _recompute_fields(recompute: str) -> dict[str, Any]:
    if recompute in ("full", "offload"):
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _check_extra(extra: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(TransformerConfig) if f.init and not f.name.startswith("_")]
    problems = []
    for name in extra:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean engine.extra.{close[0]}?" if close else ""
            problems.append(f"engine.extra.{name}: Megatron-Core's TransformerConfig has no such field{hint}")
    if problems:
        raise ConfigError(problems)
