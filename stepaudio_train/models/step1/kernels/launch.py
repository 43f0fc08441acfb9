"""The kernels of sqrt_alibi.py as PyTorch operations with gradients, which torch.compile takes as they are.

Shapes: R rows, T queries, S keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from stepaudio_train.models.step1.kernels import sqrt_alibi

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)
# What the largest of the tiles that are taken untimed need, rounded up: an A100 has 163 KiB, an H100 227.
MIN_SHARED_BYTES = 160 * 1024
# With fewer, choosing tiles by timing costs more than it can give, and would choose for short rows.
MIN_TUNED_KEYS = 1024
# Keys of all of a kernel's programs together that keep a large GPU busy: 512 tiles of 128.
MIN_POSITIONS = 512 * 128


@dataclass(frozen=True)
class Tiles:
    """How much of the scores a program holds at a time, with how many warps, and with how many loads in flight."""

    heads: int
    """Query heads at a time."""
    block_m: int
    """Queries."""
    block_n: int
    """Keys."""
    num_warps: int
    num_stages: int

    def config(self, most_heads: int) -> triton.Config:
        """For programs of at most `most_heads` query heads."""
        blocks = {"HEADS": math.gcd(self.heads, most_heads), "BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        return triton.Config(blocks, num_warps=self.num_warps, num_stages=self.num_stages)


# Head dim up to which they hold, then candidates by kernel; the first is taken where nothing is timed. docs/kernels.md
# says how they were found.
TILES: dict[int, dict[str, tuple[Tiles, ...]]] = {
    64: {
        "forward_kernel": (Tiles(2, 128, 64, 8, 2), Tiles(4, 64, 64, 4, 2), Tiles(1, 128, 128, 8, 2)),
        "dq_kernel": (Tiles(2, 128, 64, 8, 2), Tiles(2, 64, 64, 4, 2), Tiles(1, 128, 64, 8, 2)),
        "dk_dv_kernel": (Tiles(2, 64, 128, 8, 2), Tiles(2, 64, 64, 4, 2), Tiles(1, 64, 128, 8, 2)),
    },
    128: {
        "forward_kernel": (Tiles(2, 128, 64, 8, 2), Tiles(1, 128, 128, 8, 2), Tiles(1, 128, 64, 8, 2)),
        "dq_kernel": (Tiles(1, 128, 64, 8, 2), Tiles(2, 128, 32, 8, 2)),
        "dk_dv_kernel": (Tiles(1, 64, 128, 8, 2), Tiles(2, 32, 64, 4, 2)),
    },
}
# Products of fp32 numbers are for comparison, not for speed: small tiles, since a number takes twice the room.
TILES_OF_FLOAT32 = Tiles(1, 32, 32, 4, 1)


def why_unsuitable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps the kernels from running on such tensors; None if nothing does."""
    if device.type != "cuda":
        return f"they run on CUDA, not on {device.type}"
    shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if shared_bytes < MIN_SHARED_BYTES:
        return f"{shared_bytes} bytes of shared memory a block, the tiles need {MIN_SHARED_BYTES}"
    return _why_untried(dtype, head_dim)


def _why_untried(dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in DTYPES:
        return f"{dtype} is none of {', '.join(map(str, DTYPES))}"
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    return None


def document_spans(documents: Tensor) -> tuple[Tensor, Tensor]:
    """First position of every position's document, and first position behind it, both [R, S] int32.

    A document is a run of equal numbers in `documents` [R, S]. A number that comes back after another in its row is an
    error, which on a GPU is raised when the GPU gets there.
    """
    length = documents.shape[1]
    positions = torch.arange(length, device=documents.device, dtype=torch.int32)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents.diff(dim=1) != 0
    last = first.roll(-1, dims=1)
    in_order = documents.sort(dim=1).values
    torch._assert_async(
        (first[:, 1:].sum(1) == (in_order.diff(dim=1) != 0).sum(1)).all(),
        "documents: a number comes back after another in its row; number them anew, or use backend='flex' or 'dense'",
    )
    starts = torch.where(first, positions, 0).cummax(dim=1).values
    ends = torch.where(last, positions + 1, length).flip(1).cummin(dim=1).values.flip(1)
    return starts.to(torch.int32), ends.to(torch.int32)


def sqrt_alibi_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Causal attention with scale D^-0.5 and the bias -slope * sqrt(distance) within documents; paper 3.2.

    q [R, T, H, D], k and v [R, S, G, D], slopes [H] float32 -> [R, T, H, D]. Queries are the last T of the S
    positions; query head h reads key/value head h // (H / G). `starts` and `ends` are `document_spans` of all S.
    bf16 and fp16 are multiplied as they are and summed in fp32. The same inputs give the same bits, forward and
    backward, as long as tiles are not chosen anew by timing: see `_launch`.

    Raises:
        ValueError: these tensors do not suit the kernels, with all reasons at once; or they are on a CPU without
            TRITON_INTERPRET=1.
    """
    problems = []
    rows, num_queries, num_heads, head_dim = q.shape
    num_keys, num_groups = k.shape[1:3]
    reason = _why_untried(q.dtype, head_dim)
    if reason:
        problems.append(f"{reason}; use backend='flex' or backend='dense'")
    if not q.dtype == k.dtype == v.dtype:
        problems.append(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; give all three one dtype")
    if k.shape != (rows, num_keys, num_groups, head_dim) or v.shape != k.shape or num_heads % num_groups:
        problems.append(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: [R, T, H, D] and twice [R, S, G, D]")
    if num_queries > num_keys:
        problems.append(f"{num_queries} queries, {num_keys} keys: queries are the last of the keys' positions")
    if starts.shape != (rows, num_keys) or ends.shape != starts.shape:
        problems.append(f"documents of shape {list(starts.shape)}: must be the keys', {[rows, num_keys]}")
    if problems:
        raise ValueError("sqrt-ALiBi kernels: " + "; ".join(problems))
    return _attention(q, k, v, slopes.to(torch.float32), starts, ends)[0]


@torch.library.custom_op("stepaudio::sqrt_alibi_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The output [R, T, H, D], and log2 of the sum of weights [R, H, T] float32, which the backward reads."""
    q, k, v = _readable(q, k, v)
    out, log_total = torch.empty_like(q), _per_query(q)
    pointers = (q, k, v, slopes.contiguous(), starts.contiguous(), out, log_total)
    _launch("forward_kernel", pointers, (q, k, v, out), q, k)
    return out, log_total


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_readable(q)[0]), _per_query(q)


@torch.library.custom_op("stepaudio::sqrt_alibi_attention_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    starts: Tensor,
    ends: Tensor,
    out: Tensor,
    log_total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    d_out, q, k, v = _readable(d_out, q, k, v)
    slopes = slopes.contiguous()
    dq, delta = torch.empty_like(q), torch.empty_like(log_total)
    pointers = (q, k, v, slopes, starts.contiguous(), out, d_out, log_total, delta, dq)
    _launch("dq_kernel", pointers, (q, k, v, out, d_out, dq), q, k)
    # Programs share a group's heads; their parts of its gradient are added here, always in the same order.
    rows, num_keys, num_groups, head_dim = k.shape
    heads = _heads_per_program(q.shape[2] // num_groups, rows * q.shape[2] * num_keys)
    dk, dv = (q.new_empty(rows, num_keys, q.shape[2] // heads, head_dim, dtype=torch.float32) for _ in range(2))
    pointers = (q, k, v, slopes, ends.contiguous(), d_out, log_total, delta, dk, dv)
    _launch("dk_dv_kernel", pointers, (q, k, v, d_out, dk, dv), q, k, heads)
    dk, dv = (x.unflatten(2, (num_groups, -1)).sum(3) for x in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_attention_backward.register_fake
def _(d_out, q, k, v, slopes, starts, ends, out, log_total):
    return torch.empty_like(_readable(q)[0]), *(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v)
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(d_out, *ctx.saved_tensors), None, None, None


_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def _readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where the elements of a head do not lie side by side."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _per_query(q: Tensor) -> Tensor:
    rows, num_queries, num_heads, _ = q.shape
    return q.new_empty(rows, num_heads, num_queries, dtype=torch.float32)


def _heads_per_program(group_size: int, positions: int) -> int:
    """Heads whose gradients of k and v one program adds up, when all heads together have so many `positions`.

    As many as divide the group and leave enough programs: fewer parts are less memory. But two, if they can be.
    """
    fitting = [n for n in range(1, group_size + 1) if group_size % n == 0 and positions // n >= MIN_POSITIONS]
    return max([*fitting, math.gcd(group_size, 2)])


def _candidates(name: str, head_dim: int, most_heads: int, dtype: torch.dtype) -> list[triton.Config]:
    if dtype == torch.float32:
        return [TILES_OF_FLOAT32.config(most_heads)]
    by_kernel = next(by_kernel for most, by_kernel in TILES.items() if head_dim <= most)
    return [tiles.config(most_heads) for tiles in by_kernel[name]]


@cache
def _tuned(name: str, head_dim: int, most_heads: int, dtype: torch.dtype) -> Any:
    """The kernel with tiles chosen by timing at its first call."""
    return triton.autotune(_candidates(name, head_dim, most_heads, dtype), key=[])(getattr(sqrt_alibi, name))


def _launch(
    name: str, pointers: tuple[Tensor, ...], strided: tuple[Tensor, ...], q: Tensor, k: Tensor, heads: int | None = None
) -> None:
    """Run a kernel on its tensors, those of `strided` with strides of rows, positions and heads.

    heads: of each program, for `dk_dv_kernel`; the others have as many as they compute at a time.

    On a GPU the first call with many keys times the candidates for tiles. The choice may differ from run to run, and
    with it the last bits; under torch.use_deterministic_algorithms the first candidate is always taken.
    """
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"sqrt-ALiBi kernels: on {q.device.type} they run in Triton's interpreter alone, for tests; type "
            "TRITON_INTERPRET=1 before the command, or use backend='dense'"
        )
    rows, num_queries, num_heads, head_dim = q.shape
    num_keys, num_groups = k.shape[1:3]
    most_heads = heads or num_heads // num_groups

    def grid(chosen: dict[str, int]) -> tuple[int, int]:
        length, block = (num_keys, "BLOCK_N") if heads else (num_queries, "BLOCK_M")
        return rows * num_heads // (heads or chosen["HEADS"]), triton.cdiv(length, chosen[block])

    arguments = [*pointers, *(x.stride()[:3] for x in strided), num_queries, num_keys, num_heads, num_groups]
    if heads:
        arguments.append(heads)
    # Without fusion, which Triton 3.10 leaves off by default, the bias would be two operations a score.
    options = {"HEAD_DIM": head_dim, "enable_fp_fusion": True}
    if q.is_cuda and num_keys >= MIN_TUNED_KEYS and not torch.are_deterministic_algorithms_enabled():
        _tuned(name, head_dim, most_heads, q.dtype)[grid](*arguments, **options)
    else:
        first = _candidates(name, head_dim, most_heads, q.dtype)[0]
        getattr(sqrt_alibi, name)[grid](*arguments, **options, **first.all_kwargs())
