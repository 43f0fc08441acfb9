"""Log-probabilities and entropies from hidden states: values and gradients of the plain formula, in little memory.

That ranks put theirs together is tested in tests/distributed/test_value_head.py.
"""

import math
import re
import subprocess
import sys

import pytest
import torch

from stepaudio_train.models.step1 import vocab_parallel
from stepaudio_train.models.step1.vocab_parallel import KEPT_BYTES, target_log_probs

KEPT, RECOMPUTED = KEPT_BYTES, 0


def plain(hidden, weight, targets):
    """[2, N]: log-probabilities and entropies."""
    log_p = (hidden @ weight.T).log_softmax(-1)
    return torch.stack([log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)])


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven tokens of a vocabulary of 101 at a time."""
    monkeypatch.setattr(vocab_parallel, "_CPU_CHUNK_ELEMENTS", 7 * 101)
    monkeypatch.setattr(vocab_parallel, "_MIN_CHUNK_TOKENS", 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kept_bytes", [KEPT, RECOMPUTED])
@pytest.mark.parametrize("used", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_values_and_gradients(small_chunks, dtype, tolerance, kept_bytes, used):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(101, 24, generator=generator).mul(0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, 101, (50,), generator=generator)
    # Of the log-probabilities and of the entropies; an objective may leave out the ones or the others.
    factors = torch.randn(2, 50, generator=generator) * torch.tensor(used)[:, None]

    got = target_log_probs(hidden, weight, targets, entropies=True, kept_bytes=kept_bytes)
    loss = sum((x * f).sum() for x, f in zip(got, factors, strict=True) if f.any())
    grads = torch.autograd.grad(loss, (hidden, weight))

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = plain(*exact, targets)
    expected_grads = torch.autograd.grad((expected * factors).sum(), exact)

    for found, wanted in zip(got, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * 5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = expected_grad.abs().max()
        torch.testing.assert_close(grad.double() / scale, expected_grad / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kept_bytes", [KEPT, RECOMPUTED])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_float64_stays_float64(small_chunks, kept_bytes, used):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, generator=generator).requires_grad_() for n in (9, 101))
    targets = torch.arange(9)

    def head(h, w):
        found = target_log_probs(h, w, targets, entropies=True, kept_bytes=kept_bytes)
        return tuple(found[i] for i in used)

    assert torch.autograd.gradcheck(head, (hidden, weight), fast_mode=True)


@pytest.mark.parametrize("kept_bytes", [KEPT, RECOMPUTED])
def test_autocast_computes_in_bf16_and_a_frozen_head_has_no_gradient(kept_bytes):
    hidden, weight = torch.randn(40, 8).requires_grad_(), torch.randn(11, 8)
    targets = torch.arange(40) % 11
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = target_log_probs(hidden, weight, targets, kept_bytes=kept_bytes)
    got.sum().backward()
    rounded = [x.detach().bfloat16().double() for x in (hidden, weight)]
    torch.testing.assert_close(got.double(), plain(*rounded, targets)[0], rtol=2e-2, atol=2e-2)
    assert got.dtype == hidden.grad.dtype == torch.float32 and weight.grad is None


def test_without_gradients_nothing_of_the_logits_is_kept():
    hidden, weight = torch.randn(40, 8), torch.randn(11, 8)
    targets = torch.arange(40) % 11
    got, entropies = target_log_probs(hidden, weight, targets)
    assert not got.requires_grad and entropies is None
    torch.testing.assert_close(got, (hidden @ weight.T).log_softmax(-1)[torch.arange(40), targets])


@pytest.mark.parametrize("kept_bytes", [0, KEPT_BYTES])
def test_what_is_certain_has_next_to_no_gradient_in_bf16(kept_bytes):
    """1 - p is made of numbers that are not rounded yet."""
    weight = torch.eye(64, dtype=torch.bfloat16).mul(10).requires_grad_()
    hidden = torch.eye(64, dtype=torch.bfloat16)[:8].mul(1.25).requires_grad_()
    log_probs, _ = target_log_probs(hidden, weight, torch.arange(8), kept_bytes=kept_bytes)
    log_probs.sum().backward()
    wrong = -torch.expm1(log_probs.detach().double())
    assert 1e-4 < wrong.max() < 1e-3, "less than half of what bf16 tells apart from 1"
    torch.testing.assert_close(hidden.grad.diagonal().double(), 10 * wrong, rtol=2e-2, atol=0.0)


def test_no_tokens():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    got, entropies = target_log_probs(hidden, weight, torch.empty(0, dtype=torch.int64), entropies=True)
    (got.sum() + entropies.sum()).backward()
    assert got.shape == entropies.shape == (0,)
    assert weight.grad.count_nonzero() == 0


def test_a_certain_softmax_has_no_entropy_and_a_flat_one_log_v():
    """Far logits: exp underflows to zero, whose logarithm must not make nan."""
    hidden = torch.tensor([[1000.0], [0.0]], requires_grad=True)
    weight = torch.linspace(-1, 1, 11)[:, None].requires_grad_()
    _, entropies = target_log_probs(hidden, weight, torch.tensor([0, 0]), entropies=True)
    torch.testing.assert_close(entropies, torch.tensor([0.0, math.log(11)]))
    gradients = torch.autograd.grad(entropies.sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in gradients)
    # Both are where the entropy is flat.
    torch.testing.assert_close(gradients[0], torch.zeros(2, 1), rtol=0, atol=1e-6)


PEAK = """
import os
from pathlib import Path
import torch
from torch.nn.functional import cross_entropy
from stepaudio_train.models.step1.vocab_parallel import target_log_probs

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def head(hidden, weight, targets):
    return -target_log_probs(hidden, weight, targets, kept_bytes=KEPT_BYTES)[0].sum()

def plain(hidden, weight, targets):
    return cross_entropy(hidden @ weight.T, targets, reduction="sum")

def peak(function, num_tokens):
    hidden, weight = torch.randn(num_tokens, 16).requires_grad_(), torch.randn(VOCAB, 16).requires_grad_()
    targets = torch.randint(0, VOCAB, (num_tokens,))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    function(hidden, weight, targets).backward()
    return status("VmHWM") - before

for function in (head, plain):
    peak(function, 256)  # libraries are loaded
    print(peak(function, 4096) / (4096 * VOCAB * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kept_bytes, lowest, highest", [(RECOMPUTED, 0.0, 0.3), (2**31, 0.9, 1.4)])
def test_peak_memory_in_tensors_of_the_logits_size(kept_bytes, lowest, highest):
    program = PEAK.replace("KEPT_BYTES", str(kept_bytes)).replace("VOCAB", str(2**14))
    # What is freed is given back at once.
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    ours, plain = map(float, re.findall(r"[\d.]+", finished.stdout))
    assert lowest <= ours <= highest
    assert plain > 1.8
