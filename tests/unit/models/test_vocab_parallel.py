"""Log-probabilities from a cut vocabulary: values and gradients of the plain formula."""

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
def test_values_and_gradients(monkeypatch, dtype, tolerance, chunk_elements):
    monkeypatch.setattr(vocab_parallel, "_CPU_CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(101, 24, generator=generator).mul(0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, 101, (50,), generator=generator)
    factors = torch.randn(50, generator=generator)

    got = target_log_probs(hidden, weight, targets, 0, OneRank())
    grads = torch.autograd.grad((got * factors).sum(), (hidden, weight))

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = (exact[0] @ exact[1].T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    expected_grads = torch.autograd.grad((expected * factors).sum(), exact)

    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * 5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = expected_grad.abs().max()
        torch.testing.assert_close(grad.double() / scale, expected_grad / scale, rtol=0, atol=tolerance)


def test_without_gradients_nothing_of_the_logits_is_kept():
    hidden, weight = torch.randn(40, 8), torch.randn(11, 8)
    targets = torch.arange(40) % 11
    got = target_log_probs(hidden, weight, targets, 0, OneRank())
    assert not got.requires_grad
    torch.testing.assert_close(got, (hidden @ weight.T).log_softmax(-1)[torch.arange(40), targets])


def test_no_tokens():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    got = target_log_probs(hidden, weight, torch.empty(0, dtype=torch.int64), 0, OneRank())
    got.sum().backward()
    assert got.shape == (0,)
    assert weight.grad.count_nonzero() == 0
