"""DeepSpeed behind the engine contract: data parallelism with states, gradients and weights cut over the ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepaudio_train.config.schema import RunConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.engines.base import Engine, NonFiniteError, StepResult, blank_outputs, loss_of_all
from stepaudio_train.engines.hf_model import initial_adapters, merged_weights
from stepaudio_train.engines.precision import choose_dtype
from stepaudio_train.engines.process_group import join_process_group, own_device
from stepaudio_train.models.step1.lora import adapter_parameters, adapters_off, base_parameters
from stepaudio_train.models.step1.weight_map import checked, num_parameters
from stepaudio_train.objectives.base import Objective, ObjectiveOutput, TokenOutputs, needs_entropies


class DeepSpeedEngine(Engine):
    """Joins the process group that torchrun's environment variables describe; every rank is a data-parallel rank."""

    def __init__(self, config: RunConfig, trained: bool = True) -> None:
        """
        Args:
            trained: False: there are neither gradients nor an optimizer, and the engine is a `Judge` alone.
        """
        self.config = config
        self.device = own_device(config.engine.device)
        self._owns_process_group = join_process_group(self.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank, self.data_parallel_size = self.rank, self.world_size
        self.data_parallel_group = dist.group.WORLD
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        from stepaudio_train.engines.deepspeed.checkpoint import CheckpointIO
        from stepaudio_train.engines.deepspeed.zero import ZeroModel

        dtype = choose_dtype(config.engine.precision, self.device)
        self._zero = ZeroModel(config, self.device, dtype, trained)
        self._base = base_parameters(self._zero.model)
        self._adapters = adapter_parameters(self._zero.model)
        if config.lora is not None:
            self._assign(self._adapters, dict(initial_adapters(config, config.lora)))
        self._checkpoints = CheckpointIO(self._zero, config, dtype)

    def num_parameters(self) -> int:
        return num_parameters(self.config.model)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Rank 0 alone asks for tensors, one at a time; what it raises, every rank raises."""
        self._assign(self._base, weights)

    def full_weights(self, device: torch.device, every_replica: bool) -> Iterator[tuple[str, Tensor]]:
        # Each rank is a replica, and has to help put every tensor together.
        full = partial(self._zero.full, device=device)
        pairs = merged_weights(self.config, self._base, self._adapters, full)
        return (pair for pair in pairs if every_replica or self.is_main)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._adapters.items():
            value = self._zero.full(parameter, torch.device("cpu"))
            if self.is_main:
                yield name, value

    def without_adapters(self) -> AbstractContextManager[None]:
        return adapters_off(self._zero.model) if self._adapters else super().without_adapters()

    def train_step(self, micro_batches: Sequence[TokenBatch], objective: Objective, learning_rate: float) -> StepResult:
        batches = [batch.to(self.device) for batch in micro_batches]
        weight = self._global_weight(batches, objective)
        if not (weight and math.isfinite(weight)):
            raise NonFiniteError(f"loss nan, loss weight {weight}")
        # DeepSpeed averages over the ranks; what it then has are sums over tokens, divided by the global weight.
        scale = self.world_size / weight
        outputs: list[ObjectiveOutput] = []
        totals: dict[str, tuple[float, float]] = {}
        for batch in batches:
            last = batch is batches[-1]
            self._zero.announce(last)
            given = self._forward(batch, needs_entropies(objective))
            outputs.append(objective(given, batch))
            if last:
                loss_sum, totals = self._summed(outputs)
                # DeepSpeed leaves out a step whose gradients are not finite: so they shall not be if the loss is not.
                scale = scale if math.isfinite(loss_sum) else math.nan
            self._zero.backward(loss_of_all(given, outputs[-1]) * scale)
        norm = self._zero.step(learning_rate)
        if not math.isfinite(norm):
            raise NonFiniteError(f"loss {loss_sum / weight}, gradient norm {norm}")
        return StepResult(loss_sum / weight, norm, totals)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[TokenBatch], objective: Objective) -> dict[str, tuple[float, float]]:
        batches = [batch.to(self.device) for batch in micro_batches]
        given = self.outputs(batches, needs_entropies(objective))
        return self._summed([objective(*pair) for pair in zip(given, batches, strict=True)])[1]

    @torch.no_grad()
    def outputs(self, micro_batches: Sequence[TokenBatch], entropies: bool = False) -> list[TokenOutputs]:
        self._zero.model.eval()
        outputs = [self._forward(batch.to(self.device), entropies) for batch in micro_batches]
        self._zero.model.train()
        return outputs

    def save(self, directory: Path, background: bool = False) -> None:
        """Synchronous whatever `background` says. Of a model with adapters, what is trained is written: they, and a
        value head."""
        self._checkpoints.save(directory)

    def load(self, directory: Path) -> None:
        self._checkpoints.load(directory)

    def barrier(self) -> None:
        dist.barrier()

    def any_rank(self, flag: bool) -> bool:
        answer = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer)

    def close(self) -> None:
        self._zero.close()
        if self._owns_process_group:
            dist.destroy_process_group()

    def _forward(self, batch: TokenBatch, entropies: bool) -> TokenOutputs:
        recompute = self.config.engine.recompute if torch.is_grad_enabled() else "none"
        return TokenOutputs(*self._zero.token_outputs(batch, entropies, recompute))

    def _global_weight(self, batches: Sequence[TokenBatch], objective: Objective) -> float:
        """What the step's loss will be divided by: an objective weighs tokens alike, whatever the log-probabilities."""
        weights = [objective(blank_outputs(self.config, b, objective), b).weight_sum for b in batches]
        total = torch.stack(weights).sum(dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def _summed(self, outputs: Sequence[ObjectiveOutput]) -> tuple[float, dict[str, tuple[float, float]]]:
        """Loss sum and metrics over these micro-batches of all ranks."""
        packed = [torch.cat([o.loss_sum.detach().view(1), *o.metrics.values()]) for o in outputs]
        total = torch.stack(packed).sum(0, dtype=torch.float64)
        dist.all_reduce(total)
        loss_sum, *sums = total.tolist()
        return loss_sum, dict(zip(outputs[0].metrics, zip(sums[::2], sums[1::2], strict=True), strict=True))

    def _assign(self, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            value, problem = torch.empty(0), None
            shape = self._zero.shape(parameter)
            if self.is_main:
                try:
                    value = checked(weights, name, shape)
                except (KeyError, ValueError) as error:
                    problem = error
            told = [problem]
            dist.broadcast_object_list(told, device=self.device)
            if told[0] is not None:
                raise told[0]
            self._zero.assign(parameter, self._zero.broadcast(value, shape))
