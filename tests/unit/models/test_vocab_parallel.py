"""Log-probabilities and entropies from a cut vocabulary: values and gradients of the plain formula.

That ranks put theirs together is tested in tests/distributed/test_value_head.py.
"""

import math

import pytest
import torch

from stepaudio_train.models.step1 import vocab_parallel
from stepaudio_train.models.step1.vocab_parallel import target_log_probs


class OneRank:
    """A process group of this process alone."""

    @staticmethod
    def size() -> int:
        return 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("chunk_elements", [1, 2**21])
@pytest.mark.parametrize("used", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_values_and_gradients(monkeypatch, dtype, tolerance, chunk_elements, used):
    monkeypatch.setattr(vocab_parallel, "_CPU_CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(101, 24, generator=generator).mul(0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, 101, (50,), generator=generator)
    # Of the log-probabilities and of the entropies; an objective may leave out the ones or the others.
    factors = torch.randn(2, 50, generator=generator) * torch.tensor(used)[:, None]

    got = target_log_probs(hidden, weight, targets, 0, OneRank(), entropies=True)
    loss = sum((x * f).sum() for x, f in zip(got, factors, strict=True) if f.any())
    grads = torch.autograd.grad(loss, (hidden, weight))

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    log_p = (exact[0] @ exact[1].T).log_softmax(-1)
    expected = (log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1))
    expected_grads = torch.autograd.grad((torch.stack(expected) * factors).sum(), exact)

    for found, wanted in zip(got, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * 5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = expected_grad.abs().max()
        torch.testing.assert_close(grad.double() / scale, expected_grad / scale, rtol=0, atol=tolerance)


def test_without_gradients_nothing_of_the_logits_is_kept():
    hidden, weight = torch.randn(40, 8), torch.randn(11, 8)
    targets = torch.arange(40) % 11
    got, entropies = target_log_probs(hidden, weight, targets, 0, OneRank())
    assert not got.requires_grad and entropies is None
    torch.testing.assert_close(got, (hidden @ weight.T).log_softmax(-1)[torch.arange(40), targets])


def test_no_tokens():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    got, entropies = target_log_probs(hidden, weight, torch.empty(0, dtype=torch.int64), 0, OneRank(), entropies=True)
    (got.sum() + entropies.sum()).backward()
    assert got.shape == entropies.shape == (0,)
    assert weight.grad.count_nonzero() == 0


def test_a_certain_softmax_has_no_entropy_and_a_flat_one_log_v():
    """Far logits: exp underflows to zero, whose logarithm must not make nan."""
    hidden = torch.tensor([[1000.0], [0.0]], requires_grad=True)
    weight = torch.linspace(-1, 1, 11)[:, None].requires_grad_()
    _, entropies = target_log_probs(hidden, weight, torch.tensor([0, 0]), 0, OneRank(), entropies=True)
    torch.testing.assert_close(entropies, torch.tensor([0.0, math.log(11)]))
    gradients = torch.autograd.grad(entropies.sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in gradients)
    # Both are where the entropy is flat.
    torch.testing.assert_close(gradients[0], torch.zeros(2, 1), rtol=0, atol=1e-6)
