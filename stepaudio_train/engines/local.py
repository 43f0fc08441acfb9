"""One process, plain PyTorch: the reference that every other engine is tested against."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import RunConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.engines.base import Engine, NonFiniteError, StepResult, loss_of_all
from stepaudio_train.engines.hf_model import (
    OTHER_ADAPTERS,
    adamw_options,
    initial_adapters,
    merged_weights,
    optimizer_groups,
)
from stepaudio_train.engines.precision import choose_dtype
from stepaudio_train.engines.process_group import own_device
from stepaudio_train.models.step1.fused import fuse, liger_parts
from stepaudio_train.models.step1.lora import adapter_parameters, adapters_off, add_adapters, base_parameters
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import checked, hf_shapes, num_parameters
from stepaudio_train.objectives.base import Objective, ObjectiveOutput, TokenOutputs, needs_entropies

_MODEL_FILE, _ADAPTERS_FILE = "model.safetensors", "adapters.safetensors"
_OPTIMIZER_FILE, _STATE_FILE = "optimizer.safetensors", "optimizer.json"


class LocalEngine(Engine):
    """The model of models/step1/modeling.py with torch's AdamW.

    bf16 is autocast over fp32 weights. With adapters (`lora`), the weights that stay as they are lie in bf16 then.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.rank, self.world_size = 0, 1
        self.data_parallel_rank, self.data_parallel_size = 0, 1
        self.device = own_device(config.engine.device)
        self.dtype = choose_dtype(config.engine.precision, self.device)
        self.model = Step1ForCausalLM(config.model)
        if config.lora is not None:
            add_adapters(self.model, config.lora)
            for parameter in self.model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(self.dtype)
        self.model.to(self.device)
        fuse(self.model, liger_parts(config.engine.fused_kernels, self.device, config.model.hidden_size))
        self._base, self._adapters = base_parameters(self.model), adapter_parameters(self.model)
        if config.lora is not None:
            for name, value in initial_adapters(config, config.lora):
                self._adapters[name].data.copy_(value)
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(self.model, config.optimizer), **adamw_options(config.optimizer)
        )

    def num_parameters(self) -> int:
        return num_parameters(self.config.model)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, shape in hf_shapes(self.config.model).items():
            self._base[name].data.copy_(checked(weights, name, shape))

    def full_weights(self, device: torch.device, every_replica: bool) -> Iterator[tuple[str, Tensor]]:
        return merged_weights(self.config, self._base, self._adapters, partial(_full, device=device))

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._adapters.items():
            yield name, _full(parameter, torch.device("cpu"))

    def without_adapters(self) -> AbstractContextManager[None]:
        return adapters_off(self.model) if self._adapters else super().without_adapters()

    def train_step(self, micro_batches: Sequence[TokenBatch], objective: Objective, learning_rate: float) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        outputs = []
        for batch in micro_batches:
            batch = batch.to(self.device)
            given = self._forward(batch, needs_entropies(objective))
            output = objective(given, batch)
            loss_of_all(given, output).backward()
            outputs.append(output)
        weight = float(sum(o.weight_sum for o in outputs))
        loss = float(sum(o.loss_sum.detach() for o in outputs)) / weight if weight else math.nan
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        # Micro-batches add up sums, so the one division by the global weight comes here, together with the clipping.
        # Added up in float64: float32 is some 1e-5 off for a million elements.
        squares = sum(float(g.square().sum(dtype=torch.float64)) for g in grads)
        norm = math.sqrt(squares) / weight if weight else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(f"loss {loss}, gradient norm {norm}")
        clip = self.config.optimizer.clip_grad_norm
        torch._foreach_mul_(grads, (min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0) / weight)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["learning_rate_multiplier"]
        self.optimizer.step()
        return StepResult(loss, norm, _added(outputs))

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[TokenBatch], objective: Objective) -> dict[str, tuple[float, float]]:
        batches = [batch.to(self.device) for batch in micro_batches]
        return _added([objective(self._forward(batch, needs_entropies(objective)), batch) for batch in batches])

    @torch.no_grad()
    def outputs(self, micro_batches: Sequence[TokenBatch], entropies: bool = False) -> list[TokenOutputs]:
        return [self._forward(batch.to(self.device), entropies) for batch in micro_batches]

    def save(self, directory: Path, background: bool = False) -> None:
        """Synchronous whatever `background` says: one process has nothing to gain here. Of a model with adapters, what
        is trained is written: they, and a value head."""
        trained = self._trained()
        weights = {name: p.detach().contiguous() for name, p in trained.items()}
        save_file(weights, directory / (_ADAPTERS_FILE if self._adapters else _MODEL_FILE))
        tensors, steps = {}, {}
        for name, parameter in trained.items():
            state = self.optimizer.state.get(parameter)
            if state:
                steps[name] = float(state["step"])
                tensors[f"exp_avg/{name}"] = state["exp_avg"].contiguous()
                tensors[f"exp_avg_sq/{name}"] = state["exp_avg_sq"].contiguous()
        save_file(tensors, directory / _OPTIMIZER_FILE)
        (directory / _STATE_FILE).write_text(json.dumps({"steps": steps}), encoding="utf-8")

    def load(self, directory: Path) -> None:
        if (directory / _ADAPTERS_FILE).is_file() or self._adapters:
            self._load_adapters(directory)
        else:
            self.load_weights(load_file(directory / _MODEL_FILE))
        tensors = load_file(directory / _OPTIMIZER_FILE)
        steps = json.loads((directory / _STATE_FILE).read_text(encoding="utf-8"))["steps"]
        for name, parameter in self._trained().items():
            if name in steps:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(steps[name]),
                    "exp_avg": tensors[f"exp_avg/{name}"].to(self.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(self.device),
                }

    def barrier(self) -> None:
        """One process waits for nobody."""

    def any_rank(self, flag: bool) -> bool:
        return flag

    def close(self) -> None:
        """Nothing to leave."""

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in (self._adapters | self._base).items() if p.requires_grad}

    def _load_adapters(self, directory: Path) -> None:
        path = directory / _ADAPTERS_FILE
        saved = load_file(path) if path.is_file() else {}
        trained = self._trained()
        own = {name: parameter.shape for name, parameter in trained.items()}
        if {name: tensor.shape for name, tensor in saved.items()} != own:
            raise UserError(OTHER_ADAPTERS.format(directory=directory))
        for name, parameter in trained.items():
            parameter.data.copy_(saved[name])

    def _forward(self, batch: TokenBatch, entropies: bool) -> TokenOutputs:
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        recompute = self.config.engine.recompute if torch.is_grad_enabled() else "none"
        with autocast:
            return TokenOutputs(
                *self.model.token_outputs(
                    batch.input_ids, batch.targets, batch.documents, batch.loss_weights != 0, entropies, recompute
                )
            )


def _full(parameter: nn.Parameter, device: torch.device) -> Tensor:
    return parameter.detach().to(device, torch.float32, copy=True)


def _added(outputs: Sequence[ObjectiveOutput]) -> dict[str, tuple[float, float]]:
    names = outputs[0].metrics if outputs else {}
    totals = {name: sum(o.metrics[name] for o in outputs).tolist() for name in names}
    return {name: (total[0], total[1]) for name, total in totals.items()}
