"""Values and entropies of the plain model: float64 formulas, finite differences, and files with and without a head."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.models.step1 import modeling
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import Step1ForCausalLM, ValueHead
from stepaudio_train.models.step1.weight_map import VALUE_HEAD, checked, entries, hf_shapes, num_parameters, to_megatron

PLAIN = Step1Config(
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_attention_groups=1,
    vocab_size=41,
    init_std=0.3,
)
MODEL = replace(PLAIN, value_head=True)


@pytest.fixture(scope="module")
def model() -> Step1ForCausalLM:
    torch.manual_seed(0)
    model = Step1ForCausalLM(MODEL).double()
    weights = InitialWeights(MODEL, 0)
    fresh = {n: torch.randn(s) if n in VALUE_HEAD else weights[n] for n, s in hf_shapes(MODEL).items()}
    model.load_state_dict(fresh)
    return model


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, ...]:
    """Ids, targets, documents, wanted."""
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(0, 41, (2, 2, 9), generator=generator)
    documents = torch.tensor([[0] * 9, [0] * 4 + [1] * 5], dtype=torch.int32)
    return ids, targets, documents, torch.rand(2, 9, generator=generator) < 0.6


def test_outputs_equal_the_formulas(model, batch):
    ids, targets, documents, wanted = batch
    log_probs, entropies, values = model.token_outputs(*batch, entropies=True)
    log_p = model(ids, documents).log_softmax(-1)
    torch.testing.assert_close(log_probs, log_p.gather(-1, targets[..., None])[..., 0] * wanted)
    torch.testing.assert_close(entropies, -(log_p.exp() * log_p).sum(-1) * wanted)
    hidden = model.model(ids, documents)
    torch.testing.assert_close(values, hidden @ model.value_head.weight[0] + model.value_head.bias)
    assert (values != 0).all()


def test_gradients_equal_finite_differences(model, batch):
    """Of every kind of weight, through a sum that mixes all three."""
    factors = torch.randn(3, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def mixed() -> torch.Tensor:
        return sum((x * f).sum() for x, f in zip(model.token_outputs(*batch, entropies=True), factors, strict=True))

    model.zero_grad()
    mixed().backward()
    step = 1e-6
    for name, parameter in model.named_parameters():
        for index in {0, parameter.numel() // 2}:
            flat = parameter.data.view(-1)
            before = flat[index].item()
            with torch.no_grad():
                flat[index] = before + step
                above = mixed()
                flat[index] = before - step
                difference = (above - mixed()) / (2 * step)
                flat[index] = before
            assert parameter.grad.view(-1)[index] == pytest.approx(float(difference), rel=1e-5, abs=1e-7), name


def test_the_value_head_computes_in_float32_under_autocast():
    hidden = torch.randn(3, 4, 64)
    head = ValueHead(64)
    expected = hidden.bfloat16().double() @ head.weight[0].double() + head.bias.double()
    with torch.autocast("cpu", torch.bfloat16):
        values = head(hidden.bfloat16())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_map_has_a_head_only_where_the_model_has_one():
    assert list(hf_shapes(MODEL))[-2:] == list(VALUE_HEAD)
    assert list(hf_shapes(MODEL))[:-2] == list(hf_shapes(PLAIN))
    assert hf_shapes(MODEL)["value_head.weight"] == (1, 12) and hf_shapes(MODEL)["value_head.bias"] == (1,)
    assert num_parameters(MODEL) == num_parameters(PLAIN) + 13
    assert len(entries(MODEL)) == len(entries(PLAIN)) + 2


def test_a_new_head_is_zero_and_other_weights_must_be_there():
    plain = InitialWeights(PLAIN, 0)
    assert torch.equal(to_megatron("value_head.weight", plain, MODEL, 1, 2, 42), torch.zeros(1, 12))
    assert torch.equal(InitialWeights(MODEL, 0)["value_head.bias"], torch.zeros(1))
    with pytest.raises(KeyError, match="value_head2"):
        checked(plain, "value_head2.weight", (1, 12))
    with pytest.raises(ValueError, match=r"'value_head.weight' has shape \(12,\), the model needs \(1, 12\)"):
        checked({"value_head.weight": torch.zeros(12)}, "value_head.weight", (1, 12))


def test_config_json_says_so_and_the_head_comes_back(model, tmp_path):
    single = Step1ForCausalLM.of_weights(MODEL, {n: t.float() for n, t in model.state_dict().items()})
    single.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["value_head"] is True
    assert load_file(tmp_path / "model.safetensors").keys() >= set(VALUE_HEAD)
    again = Step1ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.value_head.weight, single.value_head.weight)
    assert "value_head" not in modeling.released_config(PLAIN)
