"""The weight map: released names and shapes, and a round trip through Megatron's layout."""

import json
from pathlib import Path

import pytest
import torch

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.weight_map import entries, from_megatron, hf_shapes, num_parameters, to_megatron

RELEASED_3B = Step1Config(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=48,
    num_attention_groups=4,
    vocab_size=74752,
)
RELEASED_130B = Step1Config(
    hidden_size=12288,
    intermediate_size=31232,
    num_hidden_layers=88,
    num_attention_heads=96,
    num_attention_groups=8,
    vocab_size=74752,
)
SMALL = Step1Config(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_attention_groups=2,
    vocab_size=51,
)
SHAPES = Path(__file__).parents[4] / "shared/reference/shapes"


@pytest.mark.parametrize(
    "config, parameters, tensors", [(RELEASED_3B, 3_529_706_496, 291), (RELEASED_130B, 131_946_590_208, 795)]
)
def test_released_sizes(config, parameters, tensors):
    assert num_parameters(config) == parameters
    assert len(hf_shapes(config)) == tensors


@pytest.mark.parametrize("config, table", [(RELEASED_3B, "step_audio_tts_3b"), (RELEASED_130B, "step_audio_chat_130b")])
def test_released_names_and_shapes(config, table):
    path = SHAPES / f"{table}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    released = json.loads(path.read_text())
    assert {name: list(shape) for name, shape in hf_shapes(config).items()} == released


@pytest.mark.parametrize("tp_size, padded_vocab", [(1, 51), (2, 52)])
def test_there_and_back(tp_size, padded_vocab):
    weights = InitialWeights(SMALL, 0)
    back = {}
    for name in entries(SMALL):
        shards = [to_megatron(name, weights, SMALL, rank, tp_size, padded_vocab) for rank in range(tp_size)]
        assert len({shard.shape for shard in shards}) == 1
        back |= from_megatron(name, shards, SMALL)
    assert list(back) == list(weights)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_order_inside_the_joined_tensors():
    weights = InitialWeights(SMALL, 0)
    q, k, v = (weights[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    qkv = to_megatron("decoder.layers.1.self_attention.linear_qkv.weight", weights, SMALL, tp_rank=1, tp_size=2)
    # The second of two groups: its three query heads of four rows each, then its key head, then its value head.
    assert torch.equal(qkv, torch.cat([q[12:], k[4:], v[4:]]))
    gate, up = (weights[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    fc1 = to_megatron("decoder.layers.0.mlp.linear_fc1.weight", weights, SMALL, tp_rank=0, tp_size=2)
    assert torch.equal(fc1, torch.cat([gate[:20], up[:20]]))


def test_padding_is_zero_and_at_the_end():
    shard = to_megatron("output_layer.weight", InitialWeights(SMALL, 0), SMALL, tp_rank=1, tp_size=2, padded_vocab=52)
    assert shard.shape == (26, 24)
    assert shard[-1].count_nonzero() == 0
    assert shard[-2].count_nonzero() == 24


def test_wrong_weights_are_named():
    weights = dict(InitialWeights(SMALL, 0))
    weights["model.norm.weight"] = torch.ones(25)
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(25,\), the model needs \(24,\)"):
        to_megatron("decoder.final_layernorm.weight", weights, SMALL)
    del weights["lm_head.weight"]
    with pytest.raises(KeyError, match=r"weight 'lm_head.weight' is missing"):
        to_megatron("output_layer.weight", weights, SMALL)
    with pytest.raises(ValueError, match="51 vocabulary rows cannot be cut over 2 ranks"):
        to_megatron("embedding.word_embeddings.weight", weights, SMALL, tp_size=2)
