"""Square-root ALiBi attention over packed documents: one function, several ways to compute it (paper 3.2).

Scores get the bias -slope_h * sqrt(i - j) for j <= i within a document; every other pair is masked. Backends:

- `reference`: scores written out, any dtype: what the others are tested against;
- `dense`: scaled_dot_product_attention with the bias as a tensor: has a backward on CPU;
- `documents`: the same for one document at a time, so that pairs between documents are never computed: CPU, whole rows
  (a third of the time of `dense` for rows of 512 tokens with 6 documents each);
- `flex`: FlexAttention with a block mask, so that tiles between documents are never computed: CUDA;
- `triton`: the project's own kernels (kernels/, docs/kernels.md), where two heads share a root: CUDA, head dims 16, 32,
  64 and 128.

Shapes: R rows, T tokens, S keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)

_LONGEST_PRODUCTS = 512
"""Tokens of the documents whose scores are written out; those of longer ones take more memory than they save time."""

Backend = Literal["reference", "dense", "documents", "flex", "triton"]


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes of the heads, [H] float32, as released: 2^(-8k/n) for the n = 2^floor(log2 H) first heads, then the odd
    members of the series for 2n."""
    n = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-8.0 * k / n) for k in range(1, n + 1)]
    rest = [2.0 ** (-4.0 * k / n) for k in range(1, 2 * (num_heads - n), 2)]
    return torch.tensor(first + rest, dtype=torch.float32)


@dataclass(frozen=True)
class AttentionBias:
    """Bias and mask of one micro-batch, made once and used by every layer."""

    backend: Backend
    slopes: Tensor
    """[H] float32."""
    documents: Tensor
    """[R, S] int: of the keys; the queries are the last T of them."""
    dense: Tensor | None = None
    """[R, H, T, S], `reference` and `dense`; [1, H, L, L] for L tokens of one document, `documents`."""
    lengths: tuple[int, ...] = ()
    """`documents` only: tokens of each document, row after row."""
    block_mask: BlockMask | None = None
    """`flex` only."""
    spans: tuple[Tensor, Tensor] | None = None
    """`triton` only: first position of every position's document and first one behind it, [R, S] int32."""


def build_attention_bias(
    documents: Tensor,
    slopes: Tensor,
    dtype: torch.dtype,
    backend: Backend | Literal["auto"] = "auto",
    num_queries: int | None = None,
    head_dim: int | None = None,
) -> AttentionBias:
    """Bias for queries that are the last `num_queries` of the S positions of `documents` [R, S] (all by default).

    `auto` takes, on CUDA, the Triton kernels where they suit `dtype` and `head_dim`, which has to be given for it, and
    else, for whole rows, FlexAttention; on a CPU `documents` for whole rows that are packed; and the dense bias
    elsewhere (FlexAttention has no backward on CPU, and one new token needs no tiles).
    """
    num_keys = documents.shape[1]
    num_queries = num_keys if num_queries is None else num_queries
    if backend == "auto":
        backend = _choose_backend(documents, num_queries, dtype, head_dim)
    slopes = slopes.to(documents.device)
    if backend in ("documents", "flex") and num_queries != num_keys:
        raise ValueError(f"the {backend} backend takes whole rows; use backend='dense' with a key/value cache")
    if backend == "triton":
        from stepaudio_train.models.step1.kernels.launch import document_spans

        return AttentionBias(backend, slopes, documents, spans=document_spans(documents))
    if backend == "flex":
        return AttentionBias(backend, slopes, documents, block_mask=_block_mask(documents))
    if backend == "documents":
        lengths = _document_lengths(documents)
        longest = documents.new_zeros(1, max(lengths))
        dense = build_attention_bias(longest, slopes, dtype, "dense").dense
        return AttentionBias(backend, slopes, documents, dense=dense, lengths=lengths)
    keys = torch.arange(num_keys, device=documents.device)
    distance = keys[num_keys - num_queries :, None] - keys[None]
    root = distance.clamp(min=0).to(torch.float64 if dtype == torch.float64 else torch.float32).sqrt()
    penalty = (-slopes[:, None, None] * root).to(dtype)
    same = documents[:, num_keys - num_queries :, None] == documents[:, None, :]
    visible = same & (distance >= 0)
    dense = penalty.masked_fill(~visible[:, None], float("-inf"))
    return AttentionBias(backend, slopes, documents, dense=dense)


def sqrt_alibi_attention(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias) -> Tensor:
    """Attention with scale D^-0.5. q [R, T, H, D], k and v [R, S, G, D] -> [R, T, H, D].

    Query head h reads key/value head h // (H / G).
    """
    if bias.backend == "documents":
        return _by_document(q, k, v, bias)
    if bias.backend == "triton":
        from stepaudio_train.models.step1.kernels.launch import sqrt_alibi_attention as attend

        return attend(q, k, v, bias.slopes, *bias.spans)  # type: ignore[misc]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias.backend == "flex":
        out = _flex(q, k, v, bias)
    elif bias.backend == "dense":
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias.dense, enable_gqa=q.shape[1] != k.shape[1])
    else:
        out = _reference(q, k, v, bias)
    return out.transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias.dense
    return scores.softmax(dim=-1) @ v


def _choose_backend(documents: Tensor, num_queries: int, dtype: torch.dtype, head_dim: int | None) -> Backend:
    if (
        documents.is_cuda
        and num_queries > 1
        and head_dim is not None
        and _kernels_suit(documents.device, dtype, head_dim)
    ):
        return "triton"
    if num_queries != documents.shape[1]:
        return "dense"
    if documents.is_cuda:
        return "flex"
    # Rows of one document are computed in one go; two halves already cost half as much.
    steps = documents.diff(dim=1)
    packed = (steps > 0).sum() >= documents.shape[0] and not (steps < 0).any()
    return "documents" if packed else "dense"


@cache
def _kernels_suit(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the Triton kernels run there; if not, the log says once why."""
    if importlib.util.find_spec("triton") is None:
        reason: str | None = "triton is not installed"
    else:
        from stepaudio_train.models.step1.kernels.launch import why_unsuitable

        reason = why_unsuitable(device, dtype, head_dim)
    if reason is not None:
        log.warning("attention without the Triton kernels: %s", reason)
    return reason is None


def _document_lengths(documents: Tensor) -> tuple[int, ...]:
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents.diff(dim=1) != 0
    edges = torch.cat([starts.flatten().nonzero().squeeze(1), torch.tensor([documents.numel()])])
    return tuple(edges.diff().tolist())


def _by_document(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias) -> Tensor:
    """q [R, T, H, D], k and v [R, T, G, D] -> [R, T, H, D]."""
    tokens = [x.flatten(0, 1) for x in (q, k, v)]
    if q.dtype == torch.bfloat16 and max(bias.lengths) <= _LONGEST_PRODUCTS:
        return _DocumentAttention.apply(*tokens, bias.dense, bias.lengths).view(q.shape)  # type: ignore[no-any-return]
    gqa = q.shape[2] != k.shape[2]
    parts = []
    for one in zip(*(x.split(bias.lengths) for x in tokens), strict=True):
        q_one, k_one, v_one = (x.transpose(0, 1)[None] for x in one)
        length = q_one.shape[2]
        mask = bias.dense[:, :, :length, :length]  # type: ignore[index]
        out = scaled_dot_product_attention(q_one, k_one, v_one, attn_mask=mask, enable_gqa=gqa)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts).view(q.shape)


class _DocumentAttention(torch.autograd.Function):
    """Documents of bf16 one by one, by plain products; their probabilities are kept. On a CPU the backward of torch's
    flash attention takes three times as long in bf16. q [N, H, D], k and v [N, G, D] of all documents' tokens."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: tuple[int, ...]) -> Tensor:
        heads = _by_head(q, k, v)
        out, kept = torch.empty_like(heads[0]), []
        for q_one, k_one, v_one, out_one in zip(*(x.split(lengths, 1) for x in (*heads, out)), strict=True):
            length = q_one.shape[1]
            scores = torch.baddbmm(bias[0, :, :length, :length], q_one, k_one.mT, alpha=q.shape[2] ** -0.5)
            kept.append(scores.softmax(-1))
            torch.bmm(kept[-1], v_one, out=out_one)
        ctx.save_for_backward(*heads, *kept)
        ctx.num_groups = k.shape[1]
        return out.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        heads, kept = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        scale = heads[0].shape[2] ** -0.5
        grads = [torch.empty_like(x) for x in heads]
        lengths = [probabilities.shape[1] for probabilities in kept]
        parts = zip(*(x.split(lengths, 1) for x in (*heads, grad.transpose(0, 1), *grads)), strict=True)
        for probabilities, (q_one, k_one, v_one, grad_one, dq, dk, dv) in zip(kept, parts, strict=True):
            of_scores = torch._softmax_backward_data(grad_one @ v_one.mT, probabilities, -1, grad.dtype)
            torch.bmm(of_scores, k_one, out=dq)
            torch.bmm(of_scores.mT, q_one, out=dk)
            torch.bmm(probabilities.mT, grad_one, out=dv)
        # Query heads that share a key/value head add up.
        shared = [x.unflatten(0, (ctx.num_groups, -1)).sum(1) for x in grads[1:]]
        of_q, of_k, of_v = (x.transpose(0, 1) for x in (grads[0], *shared))
        return of_q * scale, of_k * scale, of_v, None, None


def _by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[H, N, D] each, keys and values again for every query head that reads them."""
    repeats = q.shape[1] // k.shape[1]
    return (
        q.transpose(0, 1).contiguous(),
        k.transpose(0, 1).repeat_interleave(repeats, 0),
        v.transpose(0, 1).repeat_interleave(repeats, 0),
    )


def _block_mask(documents: Tensor) -> BlockMask:
    rows, length = documents.shape

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents[row, query] == documents[row, key])

    return create_block_mask(visible, rows, None, length, length, device=str(documents.device))


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias) -> Tensor:
    score = partial(_score, slopes=bias.slopes)
    return _compiled_flex()(q, k, v, score_mod=score, block_mask=bias.block_mask, enable_gqa=q.shape[1] != k.shape[1])


def _score(value: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor, *, slopes: Tensor) -> Tensor:
    # Clamped: masked pairs pass through here too, and sqrt of a negative would poison the backward.
    return value - slopes[head] * (query - key).clamp(min=0).to(torch.float32).sqrt()


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)
