"""The head with its vocabulary cut over two ranks, exponentials kept or computed again, against the plain formula."""

import pytest
import torch
import torch.distributed as dist

from stepaudio_train.engines.process_group import join_process_group
from stepaudio_train.models.step1.vocab_parallel import KEPT_BYTES, target_log_probs
from stepaudio_train.testing.distributed import run_distributed

# Uneven, as where padding rows are left out.
ROWS = [slice(0, 60), slice(60, 101)]
KEPT = (KEPT_BYTES, 0)


def drawn() -> tuple[torch.Tensor, ...]:
    """hidden [50, 24], weight [101, 24], targets [50], factors of log-probabilities and entropies [2, 50]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 24, generator=generator)
    weight = torch.randn(101, 24, generator=generator) * 0.5
    targets = torch.randint(0, 101, (50,), generator=generator)
    return hidden, weight, targets, torch.randn(2, 50, generator=generator)


def of_rank() -> dict[int, dict[str, torch.Tensor]]:
    """By `kept_bytes`, what this rank finds."""
    join_process_group(torch.device("cpu"))
    found = {kept_bytes: of_rows(ROWS[dist.get_rank()], kept_bytes) for kept_bytes in KEPT}
    dist.destroy_process_group()
    return found


def of_rows(rows: slice, kept_bytes: int) -> dict[str, torch.Tensor]:
    hidden, weight, targets, factors = drawn()
    hidden, weight = hidden.requires_grad_(), weight[rows].clone().requires_grad_()
    found = torch.stack(target_log_probs(hidden, weight, targets, rows.start, dist.group.WORLD, True, kept_bytes))
    gradients = torch.autograd.grad((found * factors).sum(), (hidden, weight))
    dist.all_reduce(gradients[0])
    return {"found": found.detach(), "hidden": gradients[0], "weight": gradients[1]}


@pytest.fixture(scope="module")
def ranks() -> list[dict[int, dict[str, torch.Tensor]]]:
    return run_distributed(of_rank, 2)


@pytest.mark.parametrize("kept_bytes", KEPT)
def test_two_ranks_give_the_plain_formula(ranks, kept_bytes):
    hidden, weight, targets, factors = (x.double() if x.is_floating_point() else x for x in drawn())
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    log_p = (hidden @ weight.T).log_softmax(-1)
    expected = torch.stack([log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)])
    gradients = torch.autograd.grad((expected * factors).sum(), (hidden, weight))

    found = [rank[kept_bytes] for rank in ranks]
    for rank in found:
        torch.testing.assert_close(rank["found"].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["hidden"].double(), gradients[0], rtol=1e-4, atol=1e-5)
    joined = torch.cat([rank["weight"] for rank in found]).double()
    torch.testing.assert_close(joined, gradients[1], rtol=1e-4, atol=1e-5)
