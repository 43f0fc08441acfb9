"""Log-probabilities of target tokens from a vocabulary that tensor-parallel ranks share.

Shapes: N tokens, h hidden size, V vocabulary rows of this rank (padding not counted).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of the logits that are worked on at a time: on a CPU what stays in a core's cache, on a GPU what is enough to
# fill it.
_CPU_CHUNK_ELEMENTS = 2**21
_GPU_CHUNK_ELEMENTS = 2**26


def target_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, first_row: int, group: dist.ProcessGroup
) -> Tensor:
    """log softmax(hidden @ W.T)[target] over the vocabulary of all ranks, in fp32.

    Args:
        hidden: [N, h], the same on all ranks of `group`; its gradient is this rank's part of the sum over ranks.
        weight: [V, h], this rank's rows of W, without padding rows.
        targets: [N] int64, ids in the whole vocabulary.
        first_row: id of this rank's first row.

    Returns:
        [N] float32, the same on all ranks.
    """
    return _TargetLogProbs.apply(hidden, weight, targets, first_row, group)  # type: ignore[no-any-return]


class _TargetLogProbs(torch.autograd.Function):
    """Keeps one tensor of the logits' size, exp(logit - row maximum), in the dtype of `hidden`; its backward turns that
    into the gradient in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first_row: int, group: dist.ProcessGroup
    ) -> Tensor:
        num_tokens, num_rows = hidden.shape[0], weight.shape[0]
        local = targets - first_row
        mine = (local >= 0) & (local < num_rows)
        local = local.masked_fill(~mine, 0)
        keep = any(ctx.needs_input_grad)
        chunk = _chunk_tokens(hidden, num_rows)
        exps = hidden.new_empty(num_tokens if keep else min(chunk, num_tokens), num_rows)
        maxima, sums, own = hidden.new_empty(3, num_tokens, dtype=torch.float32).unbind()
        for start in range(0, num_tokens, chunk):
            part = slice(start, min(start + chunk, num_tokens))
            kept = exps[part] if keep else exps[: part.stop - start]
            # For fp32 the product lands where it is kept; lower precisions go through an fp32 chunk.
            logits = torch.mm(hidden[part], weight.T, out=kept)
            logits = logits.float()
            own[part] = logits.gather(1, local[part, None]).squeeze(1)
            torch.amax(logits, 1, out=maxima[part])
            logits.sub_(maxima[part, None]).exp_()
            torch.sum(logits, 1, out=sums[part])
            if keep and logits is not kept:
                kept.copy_(logits)
        norms = maxima + sums.log()
        if group.size() > 1 and num_tokens:
            norms, own = _combine(norms, own.masked_fill(~mine, 0.0), group)
        if keep:
            ctx.save_for_backward(hidden, weight, exps, (maxima - norms).exp(), local, mine)
        return own - norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, exps, scales, local, mine = ctx.saved_tensors
        factors = (-grad * scales)[:, None]
        own = torch.where(mine, grad, 0.0).to(exps.dtype)[:, None]
        chunk = _chunk_tokens(hidden, weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            d_logits = exps[part]
            torch.mul(d_logits, factors[part], out=d_logits)
            d_logits.scatter_add_(1, local[part, None], own[part])
        return exps @ weight, exps.T @ hidden, None, None, None


def _combine(norms: Tensor, own: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """log-sum-exp over all ranks' rows from each rank's, and the target's logit from the rank that holds it."""
    mine = torch.stack([norms, own])
    gathered = mine.new_empty(group.size() * 2, mine.shape[1])
    dist.all_gather_into_tensor(gathered, mine, group=group)
    return gathered[::2].logsumexp(0), gathered[1::2].sum(0)


def _chunk_tokens(hidden: Tensor, num_rows: int) -> int:
    return max(16, (_GPU_CHUNK_ELEMENTS if hidden.is_cuda else _CPU_CHUNK_ELEMENTS) // num_rows)
