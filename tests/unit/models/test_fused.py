"""liger-kernel's norms and SwiGLU: chosen where they run, used where they are chosen, and equal to PyTorch's.

Its kernels do not run in Triton's interpreter (liger-kernel 0.8.5 calls methods of tensors on plain numbers there), so
the comparison needs a GPU; on a CPU a stand-in shows that the modules use them.
"""

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import Step1Config
from stepaudio_train.models.step1 import fused
from stepaudio_train.models.step1.modeling import Step1ForCausalLM

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_liger_is_taken_on_a_gpu_where_it_is_installed_and_faster(monkeypatch):
    installed = {"liger_kernel": object()}
    monkeypatch.setattr(fused.importlib.util, "find_spec", installed.get)
    swiglu, both = {"fused_swiglu"}, {"fused_norm", "fused_swiglu"}
    for hidden_size, by_default in ((3072, swiglu), (12288, both)):
        found = [fused.liger_parts(choice, CUDA, hidden_size) for choice in ("auto", "liger", "none")]
        assert found == [by_default, both, set()]
    assert not fused.liger_parts("auto", CPU, 12288) and not fused.liger_parts("none", CPU, 12288)
    with pytest.raises(UserError, match="runs on CUDA"):
        fused.liger_parts("liger", CPU, 3072)
    installed.clear()
    assert not fused.liger_parts("auto", CUDA, 12288)
    with pytest.raises(UserError, match=r"pip install 'stepaudio-train\[gpu\]'"):
        fused.liger_parts("liger", CUDA, 3072)


def test_a_fused_model_asks_for_every_norm_and_swiglu(monkeypatch):
    calls = []
    monkeypatch.setattr(fused, "rms_norm", lambda x, w, eps: calls.append("norm") or rms_norm(x, w.shape, w, eps))
    monkeypatch.setattr(fused, "swiglu", lambda gate, up: calls.append("swiglu") or silu(gate) * up)
    model = Step1ForCausalLM(Step1Config(num_hidden_layers=2, vocab_size=64))
    ids = torch.arange(10)[None]
    expected = model(ids)
    assert calls == []
    for parts, wanted in (({"fused_swiglu"}, ["swiglu"] * 2), ({"fused_norm"}, ["norm"] * 5 + ["swiglu"] * 2)):
        fused.fuse(model, frozenset(parts))
        calls.clear()
        torch.testing.assert_close(model(ids), expected)
        assert sorted(calls) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kernels_equal_the_formulas(dtype, tolerance):
    pytest.importorskip("liger_kernel")
    generator = torch.Generator("cuda").manual_seed(0)
    x, y, grad = torch.randn(3, 37, 3072, device="cuda", generator=generator).to(dtype).unbind()
    weight = torch.randn(3072, device="cuda", generator=generator).to(dtype)
    cases = (
        ((x, weight), lambda a, w: fused.rms_norm(a, w, 1e-5), lambda a, w: rms_norm(a, w.shape, w, 1e-5)),
        # Its backward writes over its inputs: copies.
        ((x, y), lambda a, b: fused.swiglu(a.clone(), b.clone()), lambda a, b: silu(a) * b),
    )
    for inputs, function, formula in cases:
        given = [value.clone().requires_grad_() for value in inputs]
        exact = [value.double().requires_grad_() for value in inputs]
        got, expected = function(*given), formula(*exact)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        grads = torch.autograd.grad(got, given, grad)
        for found, wanted in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
            scale = wanted.abs().max()
            torch.testing.assert_close(found.double() / scale, wanted / scale, rtol=0, atol=tolerance)
