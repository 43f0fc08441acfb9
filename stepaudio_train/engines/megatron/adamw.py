"""Megatron-Core's AdamW (plain or distributed) with this project's groups, learning rates and clipping."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ParamKey, ParamPredicate, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from stepaudio_train.config.schema import OptimizerConfig, RunConfig
from stepaudio_train.engines.megatron.cpu import cuda_type_names
from stepaudio_train.engines.megatron.settings import optimizer_config


class AdamW:
    """Steps the chunks' parameters from the sums of gradients in their buffers."""

    def __init__(self, config: RunConfig, chunks: Sequence[DistributedDataParallel], dtype: torch.dtype) -> None:
        self._config: OptimizerConfig = config.optimizer
        self._chunks = chunks
        on_cpu = next(chunks[0].parameters()).device.type == "cpu"
        with cuda_type_names() if on_cpu else contextlib.nullcontext():
            self.megatron: ChainedOptimizer = get_megatron_optimizer(
                optimizer_config(config, dtype),
                list(chunks),
                config_overrides={
                    ParamKey(attr="is_embedding_or_output_parameter"): {"is_decoupled_lr": True},
                    ParamKey(predicate=ParamPredicate("one_dimensional", _is_one_dimensional)): {"wd_mult": 0.0},
                },
            )
        self._initialise_states()
        self.configure_groups()

    def configure_groups(self) -> None:
        """Hyperparameters are the configuration's, also after a checkpoint that was written with others."""
        for group in self.megatron.param_groups:
            group["betas"] = (self._config.beta1, self._config.beta2)
            group["eps"] = self._config.eps
            group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
            if "fused" in group:
                group["fused"], group["foreach"] = True, False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read what `self.megatron.sharded_state_dict` was saved as, after loading."""
        (chained,) = self.megatron.chained_optimizers
        inner = chained.optimizer
        if isinstance(chained, DistributedOptimizer) and isinstance(inner, torch.optim.AdamW):
            # Megatron-Core 0.16.1 looks for torch's step count among the saved tensors, where it is not, and gives all
            # parameters one and the same tensor to count in.
            tensors = state.pop("param_state")
            chained.load_state_dict(state)
            steps = {parameter: values.pop("step") for parameter, values in inner.state.items()}
            chained.load_parameter_state_from_fully_reshardable(tensors)
            for parameter, step in steps.items():
                inner.state[parameter]["step"] = step.clone()
        else:
            chained.load_state_dict(state)
        self.configure_groups()

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def squared_norm(self) -> Tensor:
        """This rank's part of the squared L2 norm of the gradients: added over the ranks of a replica (over all ranks
        with the distributed optimizer), every parameter counts once."""
        self.megatron.prepare_grads()
        grads = [g for o in self.megatron.chained_optimizers for g in o.get_main_grads_for_grad_norm()]
        # Not by torch's norm: on a CPU it adds in fp32 one after the other, and is 4e-5 off for a million elements.
        squares = [g.square().sum() for g in grads] or [
            torch.zeros((), device=next(self._chunks[0].parameters()).device)
        ]
        return torch.stack(squares).sum(dtype=torch.float64)

    def step(self, gradient_scale: float, learning_rate: float) -> None:
        """Multiply the gradients and update. The embedding and the head have their own learning rate."""
        for chunk in self._chunks:
            chunk.scale_gradients(gradient_scale)
        multiplier = self._config.embedding_learning_rate_multiplier
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate * (multiplier if group["is_decoupled_lr"] else 1.0)
        self.megatron.step_with_ready_grads()

    def _initialise_states(self) -> None:
        """Allocate the moments now: Megatron-Core cannot save an optimizer that has made no step."""
        for chained in self.megatron.chained_optimizers:
            inner = chained.optimizer
            if not isinstance(inner, torch.optim.AdamW):
                chained.init_state_fn(inner, chained.config)
                continue
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                inner.state[parameter] = {
                    # Where torch's fused AdamW wants it.
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _is_one_dimensional(parameter: Tensor) -> bool:
    return parameter.ndim == 1
