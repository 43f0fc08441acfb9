"""Log-probabilities of target tokens, and entropies, from a vocabulary that tensor-parallel ranks share.

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
    hidden: Tensor, weight: Tensor, targets: Tensor, first_row: int, group: dist.ProcessGroup, entropies: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ W.T)[target] over the vocabulary of all ranks, and the softmax's entropy, in fp32.

    Args:
        hidden: [N, h], the same on all ranks of `group`; its gradient is this rank's part of the sum over ranks.
        weight: [V, h], this rank's rows of W, without padding rows.
        targets: [N] int64, ids in the whole vocabulary.
        first_row: id of this rank's first row.

        entropies: compute them too.

    Returns:
        Log-probabilities [N] float32, and entropies [N] float32 in nats or None; the same on all ranks.
    """
    return _TargetLogProbs.apply(hidden, weight, targets, first_row, group, entropies)  # type: ignore[no-any-return]


class _TargetLogProbs(torch.autograd.Function):
    """Keeps one tensor of the logits' size, e = exp(logit - row maximum), in the dtype of `hidden`; its backward turns
    that into the gradient in place. A probability is p = e * s, with s = exp(row maximum - log-sum-exp), and the
    entropy's gradient -p * (log p + H) is made of e * log e."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first_row: int,
        group: dist.ProcessGroup,
        entropies: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        num_tokens, num_rows = hidden.shape[0], weight.shape[0]
        local = targets - first_row
        mine = (local >= 0) & (local < num_rows)
        local = local.masked_fill(~mine, 0)
        keep = any(ctx.needs_input_grad)
        chunk = _chunk_tokens(hidden, num_rows)
        exps = hidden.new_empty(num_tokens if keep else min(chunk, num_tokens), num_rows)
        maxima, sums, own, e_log_e = hidden.new_empty(4, num_tokens, dtype=torch.float32).unbind()
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
            if entropies:
                torch.sum(torch.xlogy(logits, logits), 1, out=e_log_e[part])
            if keep and logits is not kept:
                kept.copy_(logits)
        norms = maxima + sums.log()
        found = sums.log() - e_log_e / sums if entropies else None
        if group.size() > 1 and num_tokens:
            norms, own, found = _combine(norms, own.masked_fill(~mine, 0.0), found, group)
        if keep:
            ctx.save_for_backward(hidden, weight, exps, maxima - norms, local, mine, found)
        return own - norms, found

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None and grad_entropies is None:
            return (None,) * 6
        hidden, weight, exps, log_scales, local, mine, entropies = ctx.saved_tensors
        grad = torch.zeros_like(log_scales) if grad is None else grad
        factors = -grad * log_scales.exp()
        if grad_entropies is not None:
            of_e_log_e = -grad_entropies * log_scales.exp()
            factors = factors + of_e_log_e * (log_scales + entropies)
        factors = factors[:, None]
        own = torch.where(mine, grad, 0.0).to(exps.dtype)[:, None]
        chunk = _chunk_tokens(hidden, weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            d_logits = exps[part]
            more = torch.xlogy(d_logits, d_logits) if grad_entropies is not None else None
            torch.mul(d_logits, factors[part], out=d_logits)
            if more is not None:
                d_logits += more.mul_(of_e_log_e[part, None])
            d_logits.scatter_add_(1, local[part, None], own[part])
        return exps @ weight, exps.T @ hidden, None, None, None, None


def _combine(
    norms: Tensor, own: Tensor, entropies: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of all ranks' rows: log-sum-exp from each rank's, the target's logit from the rank that holds it, and the entropy
    from that of each rank's own rows: sum of w * (H - log w), with w a rank's share of the probability."""
    mine = torch.stack([norms, own] if entropies is None else [norms, own, entropies])
    gathered = mine.new_empty(group.size() * len(mine), mine.shape[1])
    dist.all_gather_into_tensor(gathered, mine, group=group)
    each = gathered.view(group.size(), *mine.shape).unbind(1)
    log_shares = each[0] - each[0].logsumexp(0)
    total = None if entropies is None else (log_shares.exp() * (each[2] - log_shares)).sum(0)
    return each[0].logsumexp(0), each[1].sum(0), total


def _chunk_tokens(hidden: Tensor, num_rows: int) -> int:
    return max(16, (_GPU_CHUNK_ELEMENTS if hidden.is_cuda else _CPU_CHUNK_ELEMENTS) // num_rows)
