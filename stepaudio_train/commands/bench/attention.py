"""`stepaudio bench attention`: forward and backward of one layer's attention, beside what there is without the project.

Only the project's backends compute the bias by distance and the documents of a packed row. The others compute less
(no bias), or more (pairs between documents), and are what one would otherwise take. Biases and masks are made once a
batch, for all layers, and are not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stepaudio_train.commands.bench.cases import (
    BenchOptions,
    Case,
    build_case,
    leave_process_group,
    products,
    products_flops,
    rows_of,
)
from stepaudio_train.commands.bench.reporting import report
from stepaudio_train.commands.bench.timing import Contender, Work, time_in_turns
from stepaudio_train.engines.process_group import join_process_group
from stepaudio_train.models.step1.attention import (
    Backend,
    alibi_slopes,
    build_attention_bias,
    sqrt_alibi_attention,
)

_NAMES = {
    "dense": "SDPA, dense bias",
    "documents": "by document",
    "flex": "FlexAttention",
    "reference": "scores written out",
    "triton": "Triton kernels",
}
_CPU_BACKENDS = ("dense", "documents", "reference")
_GPU_BACKENDS = ("dense", "flex", "reference")
"""Beside the Triton kernels, which are ours wherever they run."""

_Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [1, T, H, D], k and v [1, T, G, D] -> anything whose sum has gradients."""


def bench_attention(options: BenchOptions) -> int:
    """Print and write the table; the exit status."""
    case = build_case(options)
    model = case.config.model
    slopes = alibi_slopes(model.num_attention_heads)
    ours = build_attention_bias(case.batch.documents, slopes, case.dtype, head_dim=model.head_dim).backend
    others = [backend for backend in get_args(Backend) if backend != ours and _runs(backend, case.device)]
    shapes = [(case.config.training.sequence_length, model.hidden_size, model.intermediate_size)]
    contenders = [
        Contender(f"ours: {_NAMES.get(ours, ours)}", partial(_backend, case, ours)),
        *(Contender(_NAMES.get(backend, backend), partial(_backend, case, backend)) for backend in others),
        Contender("SDPA, causal alone", partial(_bare, case)),
        Contender("Megatron-Core, no bias", partial(_megatron, case)),
        products(shapes, case.device, case.dtype),
    ]
    try:
        timings = time_in_turns(contenders, options.rounds, case.device, case.apart)
    finally:
        leave_process_group()
    # Of a causal document of n tokens, n^2 / 2 pairs count: 4 FLOPs each and element in the forward, twice that in the
    # backward. What a way computes beside is its own affair.
    useful = 6.0 * model.num_attention_heads * model.head_dim * case.squared_lengths
    flops = [useful] * (len(contenders) - 1) + [products_flops(shapes)]
    heads = f"{model.num_attention_heads} heads of {model.head_dim} over {model.num_attention_groups} groups"
    rows = rows_of(contenders, timings, flops)
    report(f"Attention, forward and backward, {heads}, {case.title}", rows, options.json)
    return 0


def _runs(backend: Backend, device: torch.device) -> bool:
    return backend in (_CPU_BACKENDS if device.type == "cpu" else _GPU_BACKENDS)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [1, T, H, D], k and v [1, T, G, D], and the output's gradient [1, T, H, D]."""
    model, length = case.config.model, case.config.training.sequence_length
    generator = torch.Generator(case.device).manual_seed(0)
    heads = (model.num_attention_heads, model.num_attention_groups, model.num_attention_groups)

    def drawn(count: int) -> Tensor:
        shape = (1, length, count, model.head_dim)
        return torch.randn(shape, generator=generator, device=case.device, dtype=case.dtype)

    q, k, v = (drawn(count).requires_grad_() for count in heads)
    return q, k, v, drawn(model.num_attention_heads)


def _forward_and_backward(case: Case, attend: _Attend) -> Work:
    q, k, v, grad = _inputs(case)

    def work() -> Any:
        out = attend(q, k, v)
        return torch.autograd.grad(out, (q, k, v), grad.view(out.shape))

    return work


def _backend(case: Case, backend: Backend) -> Work:
    slopes = alibi_slopes(case.config.model.num_attention_heads)
    bias = build_attention_bias(case.batch.documents, slopes, case.dtype, backend)
    return _forward_and_backward(case, partial(sqrt_alibi_attention, bias=bias))


def _bare(case: Case) -> Work:
    gqa = case.config.model.num_attention_heads != case.config.model.num_attention_groups

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    return _forward_and_backward(case, attend)


def _megatron(case: Case) -> Work:
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from stepaudio_train.engines.megatron.cpu import redirect_cuda_to_cpu
    from stepaudio_train.engines.megatron.settings import transformer_config

    join_process_group(case.device)
    if case.device.type == "cpu":
        redirect_cuda_to_cpu()
    parallel_state.initialize_model_parallel()
    config = transformer_config(case.config, case.device, case.dtype)
    core = DotProductAttention(config, 1, AttnMaskType.arbitrary, "self")
    documents = case.batch.documents
    future = torch.ones(2 * (documents.shape[1],), dtype=torch.bool, device=case.device).triu(1)
    hidden = (future | (documents[:, :, None] != documents[:, None, :]))[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Its order is [T, R, heads, D].
        return core(*(x.transpose(0, 1) for x in (q, k, v)), hidden)

    return _forward_and_backward(case, attend)
