"""Square-root ALiBi attention: slopes, bias, masks, backends."""

import pytest
import torch

from stepaudio_train.models.step1 import attention
from stepaudio_train.models.step1.attention import alibi_slopes, build_attention_bias, sqrt_alibi_attention


def make_qkv(rows=2, length=19, heads=6, groups=2, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, length, h, dim) for h in (heads, groups, groups)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def test_slopes_of_the_released_sizes():
    assert torch.allclose(alibi_slopes(48)[:2], torch.tensor([0.8409, 0.7071]), atol=1e-4)
    assert torch.allclose(alibi_slopes(48)[[31, 32, 47]], torch.tensor([0.00390625, 0.9170, 0.06816]), atol=1e-4)
    assert torch.allclose(
        alibi_slopes(96)[[0, 63, 64, 95]], torch.tensor([0.9170, 0.00390625, 0.9576, 0.06527]), atol=1e-4
    )


def test_bias_is_minus_slope_times_root_of_distance():
    bias = build_attention_bias(torch.zeros(1, 5, dtype=torch.int32), torch.tensor([0.5]), torch.float64).dense
    assert bias[0, 0, 4, 0].item() == -1.0
    assert bias[0, 0, 3, 3].item() == 0.0
    assert bias[0, 0, 0, 1].item() == float("-inf")


@pytest.mark.parametrize("backend", ["dense", "documents"])
def test_backends_equal_reference_forward_and_backward(backend):
    documents = torch.tensor([[0] * 7 + [1] * 12, [0] * 18 + [1]], dtype=torch.int32)
    results = []
    for name in ("reference", backend):
        q, k, v = make_qkv()
        bias = build_attention_bias(documents, alibi_slopes(6), torch.float64, name)
        out = sqrt_alibi_attention(q, k, v, bias)
        out.pow(2).sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for ours, reference in zip(results[1], results[0], strict=True):
        assert torch.allclose(ours, reference, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("longest", [0, 512])
def test_documents_in_bf16_lie_near_float64(groups, longest, monkeypatch):
    """By torch's own function, as longer documents, and by plain products."""
    monkeypatch.setattr(attention, "_LONGEST_PRODUCTS", longest)
    documents = torch.tensor([[0] * 7 + [1] * 1 + [2] * 57, [0] * 64 + [1]], dtype=torch.int32)
    inputs = [x.detach().bfloat16() for x in make_qkv(length=65, groups=groups, dim=40)]
    results = []
    for backend, dtype in (("reference", torch.float64), ("documents", torch.bfloat16)):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        out = sqrt_alibi_attention(q, k, v, build_attention_bias(documents, alibi_slopes(6), dtype, backend))
        out.pow(2).sum().backward()
        results.append([x.double() for x in (out, q.grad, k.grad, v.grad)])
    for ours, reference in zip(results[1], results[0], strict=True):
        assert (ours - reference).norm() < 1e-2 * reference.norm()


def test_packed_rows_on_a_cpu_go_document_by_document():
    slopes = alibi_slopes(6)
    packed = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]], dtype=torch.int32)
    assert build_attention_bias(packed, slopes, torch.float32).lengths == (2, 2, 1, 2, 1)
    # One document a row; numbers that come back, which are one document to the other backends; and a cache.
    for documents in (packed * 0, packed.flip(1)):
        assert build_attention_bias(documents, slopes, torch.float32).backend == "dense"
    assert build_attention_bias(packed, slopes, torch.float32, num_queries=1).backend == "dense"


def test_packed_documents_equal_documents_alone():
    q, k, v = make_qkv(rows=1)
    documents = torch.tensor([[0] * 5 + [1] * 9 + [2] * 5], dtype=torch.int32)
    slopes = alibi_slopes(6)
    packed = sqrt_alibi_attention(q, k, v, build_attention_bias(documents, slopes, q.dtype))
    for part in (slice(0, 5), slice(5, 14), slice(14, 19)):
        bias = build_attention_bias(documents[:, part] * 0, slopes, q.dtype)
        alone = sqrt_alibi_attention(q[:, part], k[:, part], v[:, part], bias)
        assert torch.allclose(packed[:, part], alone, atol=1e-12)
