"""A global batch dealt over the data-parallel ranks so that all have the same to compute, and how well that went."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stepaudio_train.data.balance import deal_rows
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.engines.base import Engine
from stepaudio_train.tokenizers.vocabulary import PAD_ID
from stepaudio_train.training.throughput import squared_lengths, training_flops


@dataclass(frozen=True)
class BatchLoad:
    """What there is to compute in a global batch; the same on every rank."""

    num_tokens: int
    """Without padding."""
    squared_lengths: int
    """Sum over the documents of their length squared."""
    fill: float
    """Share of the rows' tokens that is no padding."""
    cost_max_over_mean: float
    """FLOPs of the data-parallel rank that has the most of them, over the mean: how much longer a step takes."""


def balanced(batch: TokenBatch, engine: Engine) -> tuple[TokenBatch, BatchLoad]:
    """Exchange rows with the other data-parallel ranks (`data/balance.py`). Every rank must call it.

    Args:
        batch: this rank's rows of the global batch; every rank has as many, equally long.

    Returns:
        The rows that this rank is to compute, the most expensive first, on the engine's device where ranks exchange
        any; and the load of the global batch.
    """
    group, num_ranks = engine.data_parallel_group, engine.data_parallel_size
    if group is not None:
        batch = batch.to(engine.device)
    tokens = (batch.input_ids != PAD_ID).sum(1)
    counts = _gathered(torch.stack([tokens, squared_lengths(batch.documents)]), group).cpu()
    num_tokens, squares = counts.transpose(0, 1).reshape(2, -1).numpy()
    row_length = batch.input_ids.shape[1]
    costs = np.array([training_flops(engine.config.model, row_length, int(square)) for square in squares])
    dealt = deal_rows(costs, num_ranks)
    totals = costs[dealt].sum(1)
    load = BatchLoad(
        int(num_tokens.sum()),
        int(squares.sum()),
        float(num_tokens.sum() / (len(costs) * row_length)),
        float(totals.max() / totals.mean()),
    )
    return _own_rows(batch, dealt, engine), load


def _gathered(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[N, ...] of the group's N ranks, in their order."""
    if group is None:
        return own[None]
    everyone = own.new_empty(group.size(), *own.shape)
    dist.all_gather(list(everyone), own, group)
    return everyone


def _own_rows(batch: TokenBatch, dealt: np.ndarray, engine: Engine) -> TokenBatch:
    """The rows `dealt` [ranks, rows a rank] gives this rank. Ranks hold the global batch one behind the other."""
    num_ranks, rows = dealt.shape
    rank, group = engine.data_parallel_rank, engine.data_parallel_group
    mine = dealt[rank]
    owner = np.empty(dealt.size, np.int64)
    owner[dealt] = np.arange(num_ranks)[:, None]
    going_to = owner[rank * rows : (rank + 1) * rows]
    leaving = torch.from_numpy(np.argsort(going_to, kind="stable"))
    num_leaving = np.bincount(going_to, minlength=num_ranks).tolist()
    num_coming = np.bincount(mine // rows, minlength=num_ranks).tolist()
    # Rows arrive in the order of the ranks they come from, and within it in the order they have there.
    in_order = torch.from_numpy(np.argsort(np.argsort(mine)))

    def exchange(tensor: Tensor) -> Tensor:
        sent = tensor[leaving.to(tensor.device)]
        if group is None:
            coming = sent
        else:
            coming = torch.empty_like(sent)
            dist.all_to_all_single(coming, sent, num_coming, num_leaving, group)
        return coming[in_order.to(tensor.device)]

    return batch.map(exchange)
