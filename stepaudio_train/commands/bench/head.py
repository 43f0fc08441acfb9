"""`stepaudio bench head`: log-probabilities of the targets and their gradients, beside logits and cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from stepaudio_train.commands.bench.cases import BenchOptions, Case, build_case, products, products_flops, rows_of
from stepaudio_train.commands.bench.reporting import report
from stepaudio_train.commands.bench.timing import Contender, Work, time_in_turns
from stepaudio_train.models.step1.vocab_parallel import KEPT_BYTES, target_log_probs

_Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden [N, h], weight [V, h], targets [N] -> scalar."""


def bench_head(options: BenchOptions) -> int:
    """Print and write the table; the exit status."""
    case = build_case(options)
    model = case.config.model
    shapes = [(case.num_tokens, model.hidden_size, model.vocab_size)]
    exp_bytes = case.num_tokens * model.vocab_size * case.dtype.itemsize
    ways = {"exponentials kept": exp_bytes, "exponentials computed again": 0}
    ours = "exponentials kept" if exp_bytes <= KEPT_BYTES else "exponentials computed again"
    contenders = [
        Contender(f"ours: {ours}", partial(_work, case, partial(_ours, kept_bytes=KEPT_BYTES))),
        *(Contender(n, partial(_work, case, partial(_ours, kept_bytes=b))) for n, b in ways.items() if n != ours),
        Contender("logits, cross entropy", partial(_work, case, _plain)),
        products(shapes, case.device, case.dtype),
    ]
    timings = time_in_turns(contenders, options.rounds, case.device, case.apart)
    # Forward and both gradients of one matrix; a product that is done twice counts once.
    useful = 3 * products_flops(shapes)
    flops = [useful] * (len(contenders) - 1) + [products_flops(shapes)]
    title = f"Head, forward and backward, {model.hidden_size} x {model.vocab_size}, {case.title}"
    report(title, rows_of(contenders, timings, flops), options.json)
    return 0


def _work(case: Case, loss: _Loss) -> Work:
    model = case.config.model
    generator = torch.Generator(case.device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device, dtype=case.dtype)

    hidden = drawn(case.num_tokens, model.hidden_size).requires_grad_()
    weight = (drawn(model.vocab_size, model.hidden_size) * model.init_std).requires_grad_()
    targets = case.batch.targets.flatten()[: case.num_tokens]
    return lambda: torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, kept_bytes: int) -> Tensor:
    return -target_log_probs(hidden, weight, targets, kept_bytes=kept_bytes)[0].sum()


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # In float32, as transformers does.
    return cross_entropy(linear(hidden, weight).float(), targets, reduction="sum")
