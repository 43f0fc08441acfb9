"""Log-probabilities of target tokens, and entropies, straight from hidden states: all the logits never exist at once.

Whole in one process, or with the vocabulary cut over tensor-parallel ranks. With respect to the logits, the gradient of
a target's log-probability is onehot - p, that of the entropy H is -p * (log p + H). Objectives weight both as they like
(DPO, PPO), so the gradients of hidden states and weight cannot be made before the loss is there. Between forward and
backward e = exp(logit - row maximum) is kept where that is little, which costs 6 N h V FLOPs; otherwise the backward
computes the logits again, slice by slice: 8 N h V.

Shapes: N tokens, h hidden size, V vocabulary rows of this rank (padding not counted).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

KEPT_BYTES = 2**28
"""Exponentials up to this size are kept between forward and backward; more are computed again."""
# A slice of the logits: on a CPU what stays in a core's cache, on a GPU what is enough to fill it. Of a large
# vocabulary more than that, since every slice reads all of the weight and adds to all of its gradient.
_CPU_CHUNK_ELEMENTS = 2**19
_GPU_CHUNK_ELEMENTS = 2**26
_MIN_CHUNK_TOKENS = 128


def target_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    first_row: int = 0,
    group: dist.ProcessGroup | None = None,
    entropies: bool = False,
    kept_bytes: int = KEPT_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ W.T)[target] over the vocabulary of all ranks, and the softmax's entropy.

    Args:
        hidden: [N, h], the same on all ranks of `group`; its gradient is this rank's part of the sum over ranks.
        weight: [V, h], this rank's rows of W, without padding rows. Under autocast both are cast.
        targets: [N] int64, ids in the whole vocabulary.
        first_row: id of this rank's first row.
        group: the ranks that share the vocabulary; None: `weight` is all of it.
        entropies: compute them too.
        kept_bytes: exponentials of more bytes than this are computed again in the backward.

    Returns:
        Log-probabilities [N], and entropies [N] in nats or None; float32 (float64 for float64), the same on all ranks.
    """
    return _TargetLogProbs.apply(hidden, weight, targets, first_row, group, entropies, kept_bytes)  # type: ignore[no-any-return]


def chunk_tokens(num_rows: int, on_gpu: bool) -> int:
    """Tokens whose logits for `num_rows` rows of the vocabulary are worked on at a time."""
    return max(_MIN_CHUNK_TOKENS, (_GPU_CHUNK_ELEMENTS if on_gpu else _CPU_CHUNK_ELEMENTS) // num_rows)


class _TargetLogProbs(torch.autograd.Function):
    """A probability is p = e * s, with s = exp(row maximum - log-sum-exp). So the gradient of a target's
    log-probability is -s * (e - onehot / s): a factor for each row, which products need not be told element by element.
    The entropy's gradient is made of e * log e."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first_row: int,
        group: dist.ProcessGroup | None,
        entropies: bool,
        kept_bytes: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        local = targets - first_row
        mine = (local >= 0) & (local < weight.shape[0])
        local = local.masked_fill(~mine, 0)
        trained = any(ctx.needs_input_grad)
        keep = trained and hidden.shape[0] * weight.shape[0] * hidden.element_size() <= kept_bytes
        kept = hidden.new_empty(len(targets), weight.shape[0]) if keep else None
        maxima, sums, own, e_log_e = hidden.new_empty(4, len(targets), dtype=_precise(hidden.dtype)).unbind()
        # One for all slices: memory that is new has to be cleared by the system first.
        slices = list(_parts(hidden, weight))
        scratch = maxima.new_empty(slices[0].stop if slices else 0, weight.shape[0])
        for part in slices:
            logits = scratch[: part.stop - part.start].copy_(linear(hidden[part], weight))
            own[part] = logits.gather(1, local[part, None]).squeeze(1)
            torch.amax(logits, 1, out=maxima[part])
            exps = logits.sub_(maxima[part, None]).exp_()
            torch.sum(exps, 1, out=sums[part])
            if entropies:
                torch.sum(torch.xlogy(exps, exps), 1, out=e_log_e[part])
            if kept is not None:
                kept[part] = exps
        norms = maxima + sums.log()
        found = sums.log() - e_log_e / sums if entropies else None
        target_exps = (own - maxima).exp_()
        if group is not None and group.size() > 1 and len(targets):
            norms, own, found = _combine(norms, own.masked_fill(~mine, 0.0), found, group)
        ctx.folded = kept is not None and not entropies
        if trained:
            folded = _less_target(target_exps, maxima, norms, mine)
            if ctx.folded:
                _set(kept, local, folded)
            ctx.save_for_backward(hidden, weight, maxima, norms, local, mine, folded, found, kept)
        return own - norms, found

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None and grad_entropies is None:
            return (None,) * 7
        hidden, weight, maxima, norms, local, mine, folded, entropies, kept = ctx.saved_tensors
        grad = torch.zeros_like(norms) if grad is None else grad
        log_scales = _log_scales(maxima, norms)
        factors = -grad * log_scales.exp()
        if grad_entropies is not None:
            of_e_log_e = -grad_entropies * log_scales.exp()
            of_e, own = factors + of_e_log_e * (log_scales + entropies), torch.where(mine, grad, 0.0)
            factors = torch.ones_like(factors)
        grad_hidden = torch.empty_like(hidden)
        # A frozen head, as under adapters, has none. Slices are added up in fp32.
        grad_weight = torch.zeros_like(weight, dtype=norms.dtype) if ctx.needs_input_grad[1] else None
        for part in [slice(None)] if ctx.folded else _parts(hidden, weight):
            if kept is not None:
                rows = kept[part]
            else:
                rows = linear(hidden[part], weight).to(norms.dtype).sub_(maxima[part, None]).exp_()
            if grad_entropies is not None:
                rows = rows * of_e[part, None] + torch.xlogy(rows, rows) * of_e_log_e[part, None]
                rows.scatter_add_(1, local[part, None], own[part, None])
            elif not ctx.folded:
                rows = rows.clone() if kept is not None else rows
                _set(rows, local[part], folded[part])
            rows = rows.to(weight.dtype)
            torch.mm(rows, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, rows.T, (hidden[part] * factors[part, None]).to(hidden.dtype))
        grad_hidden *= factors[:, None]
        return grad_hidden, grad_weight, None, None, None, None, None


def _set(rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """One element of each row. `scatter_` would copy all of them."""
    rows[torch.arange(len(rows), device=rows.device), columns] = values.to(rows.dtype)


def _log_scales(maxima: Tensor, norms: Tensor) -> Tensor:
    """log s. Where all of this rank's logits are e^80 times smaller than another's, 1 / s would not be a number."""
    return (maxima - norms).clamp_(min=-80.0)


def _less_target(target_exps: Tensor, maxima: Tensor, norms: Tensor, mine: Tensor) -> Tensor:
    """e - 1 / s of the targets on this rank, and e of column 0 for the others, which stands in their place."""
    return torch.where(mine, target_exps - (-_log_scales(maxima, norms)).exp(), target_exps)


def _parts(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    num_tokens, size = hidden.shape[0], chunk_tokens(weight.shape[0], hidden.is_cuda)
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
