"""A row's tokens cut over the ranks of a context-parallel group, each of which computes what follows from its own.

A row of T tokens is cut into 2N pieces for N ranks; rank n has the pieces n and 2N - 1 - n, one that sees few keys and
one that sees many, so that causal attention is as much work on all of them. Attention alone looks at other ranks'
tokens: it gathers keys and values, which are few where query heads share them, and computes its own queries against
those up to the piece's end (Grattafiori et al. 2024, arXiv 2407.21783, 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


class ContextParallel:
    """Which tokens are this rank's, and how all of them come together. One rank has whole rows, and moves nothing."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._size, self._rank = group, group.size(), group.rank()
        self._pieces = (self._rank, 2 * self._size - 1 - self._rank)

    def own(self, rows: Tensor) -> Tensor:
        """[R, T] -> this rank's tokens, [R, T / N]."""
        if self._size == 1:
            return rows
        pieces = rows.chunk(2 * self._size, 1)
        return torch.cat([pieces[i] for i in self._pieces], 1)

    def whole(self, own: Tensor, same_use: bool) -> Tensor:
        """This rank's [T / N, ...] -> all tokens' [T, ...] in their order, on every rank.

        Args:
            same_use: all ranks compute the same of them, and each takes the gradient of its own tokens; otherwise
                the ranks' gradients are added up.
        """
        if self._size == 1:
            return own
        # Megatron-Core's names are of tensor parallelism; the group is ours.
        gathered = gather_from_sequence_parallel_region(own, not same_use, self._group)
        pieces = gathered.chunk(2 * self._size)
        return torch.cat([*pieces[::2], *reversed(pieces[1::2])])

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's [T / N, R, G, D] of each -> all tokens', [T, R, G, D], in one message."""
        if self._size == 1:
            return key, value
        return self.whole(torch.cat([key, value], -1), same_use=False).chunk(2, -1)  # type: ignore[return-value]

    def queries(self, own: Tensor) -> Iterator[tuple[Tensor, int]]:
        """This rank's [T / N, ...] as pieces of consecutive tokens, each with the number of keys up to its end."""
        if self._size == 1:
            yield own, len(own)
            return
        for piece, tokens in zip(self._pieces, own.chunk(2), strict=True):
            yield tokens, (piece + 1) * len(tokens)
