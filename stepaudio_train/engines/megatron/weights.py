"""Weights in and out of the cut-up model by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.models.step1.megatron_spec import Step1MegatronModel
from stepaudio_train.models.step1.weight_map import entries, from_megatron, to_megatron


def load(
    chunks: Sequence[Step1MegatronModel], weights: Mapping[str, Tensor], model: Step1Config, padded_vocab: int
) -> None:
    """Set this rank's parameters from full tensors; only those it holds a part of are asked for."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in _named_parameters(chunks).items():
        parameter.data.copy_(to_megatron(name, weights, model, rank, size, padded_vocab))


def full_weights(
    chunks: Sequence[Step1MegatronModel], model: Step1Config, main: int, own_device: torch.device, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full fp32 tensor on `device`) on the rank `main` of this replica, nothing on its other
    ranks. All ranks of the replica must iterate.

    One tensor at a time: `main` never holds more than that beside its own part of the model.
    """
    own = _named_parameters(chunks)
    owners = _owners(own)
    rank = dist.get_rank()
    for name in entries(model):
        shards: list[Tensor] = []
        for owner in owners[name]:
            if rank == owner:
                shard = own[name].detach()
                if rank == main:
                    # A copy, not a view of the parameter, which goes on changing.
                    shards.append(shard.to(device, torch.float32, copy=True))
                else:
                    dist.send(shard.contiguous(), dst=main)
            elif rank == main:
                shape, dtype = owners[name][owner]
                received = torch.empty(shape, dtype=dtype, device=own_device)
                dist.recv(received, src=owner)
                shards.append(received.to(device, torch.float32))
        if rank == main:
            yield from from_megatron(name, shards, model).items()


def _named_parameters(chunks: Sequence[Step1MegatronModel]) -> dict[str, nn.Parameter]:
    """Parameters of this rank by Megatron name, with the layer's number in the whole model."""
    named: dict[str, nn.Parameter] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            room, _, rest = name.partition("decoder.layers.")
            if not room and rest:
                local, _, tail = rest.partition(".")
                # Megatron counts layers from 1.
                name = f"decoder.layers.{chunk.decoder.layers[int(local)].layer_number - 1}.{tail}"
            named[name] = parameter
    return named


def _owners(own: Mapping[str, nn.Parameter]) -> dict[str, dict[int, tuple[torch.Size, torch.dtype]]]:
    """Megatron name -> {rank: shape and dtype of its shard}, in tensor-parallel order, for this replica."""
    group = parallel_state.get_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    gathered: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in ranks]
    dist.all_gather_object(gathered, {name: (p.shape, p.dtype) for name, p in own.items()}, group=group)
    owners: dict[str, dict[int, tuple[torch.Size, torch.dtype]]] = {}
    # Tensor-parallel ranks are neighbours and in order among the global ranks.
    for rank, held in sorted(zip(ranks, gathered, strict=True)):
        for name, shape in held.items():
            owners.setdefault(name, {})[rank] = shape
    return owners
