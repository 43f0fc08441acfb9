"""Sharded checkpoints through megatron.core.dist_checkpointing: written at one layout, read at any other.

The vocabulary's padding for tensor parallelism is cut off before writing and put back after reading, so that a
checkpoint holds the real rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from stepaudio_train.config.errors import UserError
from stepaudio_train.engines.megatron.adamw import AdamW


class CheckpointIO:
    """Reads and writes the model chunks and the optimizer of this rank."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], adamw: AdamW, vocab_size: int, on_cpu: bool) -> None:
        self._chunks, self._adamw, self._vocab_size = chunks, adamw, vocab_size
        self._metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            # Over gloo on the first data-parallel rank. On a GPU all ranks get the states, and share the writing.
            "distrib_optim_fully_reshardable_mem_efficient": on_cpu,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        self._queue = AsyncCallsQueue()

    def save(self, directory: Path, background: bool) -> None:
        """Every rank calls it. With `background`, a forked process writes what was there at the time of the call."""
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        group = self._metadata["dp_cp_group"]
        if group.size() > 1:
            strategy = FullyParallelSaveStrategyWrapper(strategy, group)
        state = _map_tensors(self._state(is_loading=False), self._without_padding)
        request = dist_checkpointing.save(state, str(directory), strategy, async_sharded_save=background)
        if request is not None:
            self._queue.schedule_async_request(request)

    def finish(self, wait: bool) -> bool:
        """True once nothing is being written in the background. Every rank calls it."""
        self._queue.maybe_finalize_async_calls(blocking=wait)
        return self._queue.get_num_unfinalized_calls() == 0

    def load(self, directory: Path) -> None:
        """Every rank calls it.

        Raises:
            UserError: the optimizer was written in another form than this run's.
        """
        self._require_same_optimizer(directory)
        state = self._state(is_loading=True)
        loaded = dist_checkpointing.load(_map_tensors(state, self._without_padding), str(directory))
        for name, chunk in zip(self._chunk_names(), self._chunks, strict=True):
            chunk.module.load_state_dict(_padded_like(loaded[name], state[name]))
        self._adamw.load_state_dict(_padded_like(loaded["optimizer"], state["optimizer"]))

    def _require_same_optimizer(self, directory: Path) -> None:
        common = dist_checkpointing.load_common_state_dict(str(directory))
        saved = "param_state_sharding_type" in common["optimizer"]
        if saved != self._chunks[0].ddp_config.use_distributed_optimizer:
            raise UserError(
                f"{directory}: was written with engine.distributed_optimizer={str(saved).lower()}, which keeps Adam's "
                f"states in another form; type engine.distributed_optimizer={str(saved).lower()}"
            )

    def _chunk_names(self) -> list[str]:
        return [f"model{i}" for i in range(len(self._chunks))]

    def _state(self, is_loading: bool) -> dict[str, Any]:
        models = {
            name: chunk.module.sharded_state_dict(metadata=self._metadata)
            for name, chunk in zip(self._chunk_names(), self._chunks, strict=True)
        }
        states = self._adamw.megatron.sharded_state_dict(models, is_loading=is_loading, metadata=self._metadata)
        return {**models, "optimizer": states}

    def _without_padding(self, tensor: ShardedTensor) -> ShardedTensor:
        # Megatron-Core marks what is cut along the vocabulary by this flag, in the model and in the optimizer.
        if not tensor.allow_shape_mismatch:
            return tensor
        rows = max(0, min(tensor.local_shape[0], self._vocab_size - tensor.global_offset[0]))
        return replace(
            tensor,
            data=tensor.data.detach()[:rows],
            local_shape=(rows, *tensor.local_shape[1:]),
            global_shape=(self._vocab_size, *tensor.global_shape[1:]),
            # The last rank may hold fewer rows than the others.
            axis_fragmentations=None,
            allow_shape_mismatch=False,
        )


def _map_tensors(state: Any, function: Callable[[ShardedTensor], ShardedTensor]) -> Any:
    """A copy of the nested containers with each sharded tensor replaced."""
    if isinstance(state, ShardedTensor):
        return function(state)
    if isinstance(state, dict):
        return {key: _map_tensors(value, function) for key, value in state.items()}
    if isinstance(state, list):
        return [_map_tensors(value, function) for value in state]
    return state


def _padded_like(loaded: Any, wanted: Any) -> Any:
    """`loaded` with zero rows added to each tensor that is shorter than the sharded tensor in its place in `wanted`."""
    if isinstance(wanted, ShardedTensor) and isinstance(loaded, Tensor):
        missing = wanted.local_shape[0] - loaded.shape[0] if loaded.ndim else 0
        return torch.cat([loaded, loaded.new_zeros(missing, *loaded.shape[1:])]) if missing else loaded
    if isinstance(wanted, dict) and isinstance(loaded, dict):
        return {key: _padded_like(value, wanted.get(key)) for key, value in loaded.items()}
    if isinstance(wanted, list) and isinstance(loaded, list):
        return [_padded_like(*pair) for pair in zip(loaded, wanted, strict=True)]
    return loaded
