"""The model against the released formula, written out once more in float64."""

import math
from pathlib import Path

import pytest
import torch

from stepaudio_train.config.compose import load_config
from stepaudio_train.config.schema import PretrainConfig, Step1Config
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import hf_shapes

SMALL = Step1Config(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_attention_groups=2,
    vocab_size=97,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Step1ForCausalLM:
    model = Step1ForCausalLM(SMALL)
    weights = InitialWeights(SMALL, seed=3)
    model.load_state_dict({name: weights[name] * (1 if len(s) == 1 else 5) for name, s in hf_shapes(SMALL).items()})
    return model.double()


def plain_logits(weights: dict[str, torch.Tensor], ids: list[int], config: Step1Config) -> torch.Tensor:
    """Token by token, head by head, as the formula reads."""
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    per_group = heads // config.num_attention_groups
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * k / n) for k in range(1, n + 1)] + [2 ** (-4 * k / n) for k in range(1, 2 * (heads - n), 2)]

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        p = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f"layers.{layer}." in k}
        y = norm(x, p["input_layernorm.weight"])
        q, k, v = (y @ p[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        out = torch.zeros_like(x)
        for head in range(heads):
            mine = slice(head * dim, (head + 1) * dim)
            group = slice(head // per_group * dim, (head // per_group + 1) * dim)
            for i in range(len(ids)):
                scores = torch.stack(
                    [q[i, mine] @ k[j, group] / math.sqrt(dim) - slopes[head] * math.sqrt(i - j) for j in range(i + 1)]
                )
                out[i, mine] = scores.softmax(0) @ v[: i + 1, group]
        x = x + out @ p["self_attn.o_proj.weight"].T
        y = norm(x, p["post_attention_layernorm.weight"])
        gate = y @ p["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * (y @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def test_logits_equal_the_formula(model):
    ids = torch.randint(0, 97, (17,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = plain_logits(dict(model.state_dict()), ids, SMALL)
    assert expected.std() > 0.1
    assert torch.allclose(model(torch.tensor([ids]))[0], expected, rtol=0, atol=1e-10)
    single = Step1ForCausalLM(SMALL)
    single.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    assert torch.allclose(single(torch.tensor([ids]))[0].double(), expected, rtol=0, atol=1e-5)


def test_log_probs_and_gradients_equal_log_softmax(model):
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0] * 12, [0] * 4 + [1] * 8], dtype=torch.int32)
    wanted = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.6
    weights = torch.rand(2, 12, dtype=torch.float64) * wanted
    results = []
    for fused in (True, False):
        model.zero_grad()
        if fused:
            log_probs = model.log_probs(ids, ids.roll(-1, 1), documents, wanted)
        else:
            full = model(ids, documents).log_softmax(-1)
            log_probs = full.gather(-1, ids.roll(-1, 1)[..., None])[..., 0] * wanted
        (log_probs * weights).sum().backward()
        results.append([log_probs.detach(), *(p.grad.clone() for p in model.parameters())])
    for fused, plain in zip(*results, strict=True):
        assert torch.allclose(fused, plain, rtol=0, atol=1e-10)


def test_cached_and_left_padded_equal_whole(model):
    ids = torch.randint(1, 97, (1, 11), generator=torch.Generator().manual_seed(4))
    whole = model(ids)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    documents = torch.tensor([[-1] * 3 + [0] * 11], dtype=torch.int32)
    cache = model.new_cache()
    parts = [model(padded[:, :9], documents[:, :9], cache)]
    parts += [model(padded[:, i : i + 1], documents[:, : i + 1], cache) for i in range(9, 14)]
    assert torch.allclose(torch.cat(parts, 1)[:, 3:], whole, atol=1e-10)


def test_saved_model_reads_back(model, tmp_path: Path):
    single = Step1ForCausalLM(SMALL)
    single.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    single.save_pretrained(tmp_path)
    again = Step1ForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(single.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("preset", "count"), [("step1_3b", 3_529_706_496), ("step1_130b", 131_946_590_208)])
def test_released_sizes_on_the_meta_device(preset, count):
    config = load_config("pretrain", PretrainConfig, [f"model={preset}", "vocabulary=released"]).model
    with torch.device("meta"):
        model = Step1ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: tuple(s) for n, s in hf_shapes(config).items()
    }
    assert "lm_head.weight" in model.state_dict() and "slopes" not in str(list(model.state_dict()))
