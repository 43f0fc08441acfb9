"""The model and its optimizer in DeepSpeed's hands: forward, backward, step, and full tensors in and out.

Import this after DS_ACCELERATOR is set: DeepSpeed chooses its accelerator when it is first imported.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from stepaudio_train.config.schema import Recompute, RunConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.engines.deepspeed.settings import deepspeed_config
from stepaudio_train.engines.hf_model import adamw_options, optimizer_groups
from stepaudio_train.models.step1.attention import alibi_slopes
from stepaudio_train.models.step1.fused import fuse, liger_parts
from stepaudio_train.models.step1.lora import add_adapters
from stepaudio_train.models.step1.modeling import Step1ForCausalLM

# On a CPU DeepSpeed would compile this kernel of its all-reduce for inference, which takes a minute and a C++ compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ADAM_STATES = ("exp_avg", "exp_avg_sq")


class _Callable(Step1ForCausalLM):
    """ZeRO-3 puts weights together around `forward`, so what is asked has to be one."""

    def forward(  # type: ignore[override]
        self, batch: TokenBatch, entropies: bool, recompute: Recompute
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `token_outputs`."""
        return self.token_outputs(
            batch.input_ids, batch.targets, batch.documents, batch.loss_weights != 0, entropies, recompute
        )


class ZeroModel:
    """A `Step1ForCausalLM` cut over the ranks by ZeRO, with torch's AdamW. Weights are as the modules' constructors
    leave them. One that is not trained is cut by ZeRO-3 alone; the other stages cut nothing that it has."""

    def __init__(self, config: RunConfig, device: torch.device, dtype: torch.dtype, trained: bool) -> None:
        self._device = device
        self.stage: int = config.engine.zero_stage
        settings = deepspeed_config(config, device, dtype)
        # ZeRO-3 replaces this by a version that keeps no whole weights for the backward, for good.
        self._torch_linear = torch.nn.functional.linear
        if config.lora is not None:
            # It imports torch's compiler, which does not bear the changes that zero.Init makes to torch meanwhile.
            importlib.import_module("peft")
        # Cut up layer by layer as it is made: no rank ever holds it all.
        with deepspeed.zero.Init(config_dict_or_path=settings) if self.stage == 3 else nullcontext():
            model = _Callable(config.model)
            if config.lora is not None:
                add_adapters(model, config.lora)
        # zero.Init has rounded the slopes to the weights' type.
        model.model.slopes = alibi_slopes(config.model.num_attention_heads).to(device)
        fuse(model, liger_parts(config.engine.fused_kernels, device, config.model.hidden_size))
        self.model: Step1ForCausalLM = model
        if not trained:
            model.requires_grad_(False)
        if not trained and self.stage < 3:
            self._asked: nn.Module = model.to(device, dtype)
            return
        optimizer = None
        if trained:
            groups = optimizer_groups(model, config.optimizer)
            self._options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            optimizer = torch.optim.AdamW(groups, **adamw_options(config.optimizer))
        # Its bf16 optimizer prints what memory it takes, a screen of it.
        with redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self._asked = self.engine

    def token_outputs(
        self, batch: TokenBatch, entropies: bool, recompute: Recompute
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `Step1ForCausalLM.token_outputs`."""
        return self._asked(batch, entropies, recompute)

    def backward(self, loss: Tensor) -> None:
        """Add up gradients. DeepSpeed will divide them by the number of ranks."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def announce(self, last: bool) -> None:
        """Say before each micro-batch whether it is the step's last."""
        self.engine.set_gradient_accumulation_boundary(last)

    def step(self, learning_rate: float) -> float:
        """Clip and update; the gradients' norm before clipping. Not finite: nothing was changed."""
        # Set anew each time: reading a checkpoint puts its own values there.
        for group, options in zip(self.engine.optimizer.param_groups, self._options, strict=True):
            group.update(options, lr=learning_rate * options["learning_rate_multiplier"])
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.nan

    def full(self, parameter: nn.Parameter, device: torch.device) -> Tensor:
        """The whole master weight, a copy in fp32 on `device`. Every rank must call it."""
        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter).to(device, torch.float32, copy=True)
        with self._whole(parameter):
            return parameter.detach().to(device, torch.float32, copy=True)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Of the whole parameter, wherever its parts lie."""
        return tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)  # type: ignore[attr-defined]

    def broadcast(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Rank 0's `value`, on every rank in fp32 on its device; the others' is not looked at."""
        if dist.get_rank() == 0:
            whole = value.to(self._device, torch.float32).contiguous()
        else:
            whole = torch.empty(shape, device=self._device)
        dist.broadcast(whole, src=0)
        return whole

    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a parameter and its master weight to `value`, which all ranks have. Every rank must call it."""
        with self._whole(parameter, modifier_rank=0):
            # ZeRO-3 hands out what rank 0 writes; before it, each rank writes its own copy.
            if self.stage < 3 or dist.get_rank() == 0:
                parameter.data.copy_(value)
        if not parameter.requires_grad:
            return
        if self.stage == 3:
            safe_set_local_fp32_param(parameter, _own_part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)

    def assign_state(self, parameter: nn.Parameter, state: str, value: Tensor) -> None:
        """Set one of `ADAM_STATES` to `value`, which all ranks have. `start_adam` comes first."""
        if self.stage == 3:
            safe_set_local_optimizer_state(parameter, _own_part(parameter, value), state)
        else:
            safe_set_full_optimizer_state(parameter, value, state)

    def adam_steps(self) -> int:
        """Steps that the optimizer has made; they outlast the process in its checkpoints."""
        return max((int(state["step"]) for state in self._adamw.state.values()), default=0)

    def start_adam(self, steps: int) -> None:
        """Give the optimizer states, all zero, as after `steps` steps; AdamW has none before its first."""
        for flat in self._flat_masters():
            self._adamw.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{state: torch.zeros_like(flat) for state in ADAM_STATES},
            }
        if self.stage < 3:
            # What DeepSpeed does after the first step: the parameters' parts of the flat states.
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """DeepSpeed's name -> parameter, of those with an optimizer state."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def close(self) -> None:
        if self._asked is not self.model:
            self.engine.destroy()
        torch.nn.functional.linear = self._torch_linear

    @property
    def _adamw(self) -> torch.optim.AdamW:
        """It steps over this rank's flat fp32 partitions, not over the model's parameters."""
        return self.engine.optimizer.optimizer

    def _flat_masters(self) -> Sequence[Tensor]:
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _whole(self, parameter: nn.Parameter, modifier_rank: int | None = None) -> AbstractContextManager[None]:
        if self.stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)


def _own_part(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of `value`, flat, as ZeRO-3 cuts it: the last ranks' is filled up with zeros."""
    size = parameter.partition_numel()  # type: ignore[operator]
    start = dist.get_rank() * size
    part = value.flatten()[start : start + size]
    return nn.functional.pad(part, (0, size - part.numel()))
