"""A model of plain PyTorch that generates for a data-parallel replica, on its main rank, beside the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.engines.base import Engine
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import VALUE_HEAD, entries, hf_shapes
from stepaudio_train.rollout.generate import Generation, generate
from stepaudio_train.rollout.sampling import SamplingConfig


class ReplicaModel:
    """Keeps its tensors: weights are copied into them one by one. See `rollouts.Generator`."""

    def __init__(self, engine: Engine, dtype: torch.dtype, batch_rows: int) -> None:
        self._batch_rows = batch_rows
        self._model = _empty_model(engine.config.model, dtype, engine.device) if engine.is_replica_main else None

    def take_over(self, engine: Engine) -> int:
        own = self.weights()
        for name, tensor in engine.full_weights(engine.device, every_replica=True):
            if name not in VALUE_HEAD:
                own[name].copy_(tensor)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        engine.barrier()
        joined = 2 * largest_entry_bytes(engine.config.model) if own else 0
        return sum(tensor.nbytes for tensor in own.values()) + joined

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Generation]:
        assert self._model is not None
        return generate(self._model, prompts, sampling, seeds, self._batch_rows)

    def weights(self) -> dict[str, Tensor]:
        return {} if self._model is None else self._model.state_dict()


def largest_entry_bytes(config: Step1Config) -> int:
    """In fp32, of what an engine puts together at a time."""
    sizes = {name: torch.Size(shape).numel() for name, shape in hf_shapes(config).items()}
    return max(sum(sizes[name] for name in entry.hf) for entry in entries(config).values()) * torch.float32.itemsize


def _empty_model(config: Step1Config, dtype: torch.dtype, device: torch.device) -> Step1ForCausalLM:
    """A model without a value head, whose weights are whatever was in their memory."""
    config = replace(config, value_head=False)
    weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in hf_shapes(config).items()}
    return Step1ForCausalLM.of_weights(config, weights).to(device).requires_grad_(False)
