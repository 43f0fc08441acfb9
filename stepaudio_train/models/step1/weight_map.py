"""The one table of where every Hugging Face weight sits in Megatron-Core, cut over tensor-parallel ranks or whole.

Conversion, checkpoints, rollouts and parity tests all read this table. Hugging Face names and shapes are those of the
released model.safetensors.index.json; Megatron names are those of GPTModel, with the layer's number in the whole model
(not in its pipeline stage).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from stepaudio_train.config.schema import Step1Config


class Kind(Enum):
    """How tensor-parallel ranks share a Megatron tensor."""

    REPLICATED = "replicated"
    """Every rank holds all of it."""
    ROW = "row"
    """Cut along the input, dim 1."""
    QKV = "qkv"
    """Cut along the output by whole groups; a group is its query heads, its key head, its value head."""
    GATE_UP = "gate_up"
    """Cut along the output; a rank holds its part of the gate, then its part of the up projection."""
    VOCAB = "vocab"
    """Cut along the vocabulary, after padding it with zero rows to a multiple of the ranks."""


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind

    def of_layer(self, layer: int) -> Entry:
        return Entry(self.megatron.format(i=layer), tuple(name.format(i=layer) for name in self.hf), self.kind)


_BEFORE = (Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Kind.VOCAB),)
_LAYER = (
    Entry("decoder.layers.{i}.input_layernorm.weight", ("model.layers.{i}.input_layernorm.weight",), Kind.REPLICATED),
    Entry(
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        tuple(f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"),
        Kind.QKV,
    ),
    Entry(
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        ("model.layers.{i}.self_attn.o_proj.weight",),
        Kind.ROW,
    ),
    Entry(
        "decoder.layers.{i}.pre_mlp_layernorm.weight",
        ("model.layers.{i}.post_attention_layernorm.weight",),
        Kind.REPLICATED,
    ),
    Entry(
        "decoder.layers.{i}.mlp.linear_fc1.weight",
        ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        Kind.GATE_UP,
    ),
    Entry("decoder.layers.{i}.mlp.linear_fc2.weight", ("model.layers.{i}.mlp.down_proj.weight",), Kind.ROW),
)
_AFTER = (
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Kind.REPLICATED),
    Entry("output_layer.weight", ("lm_head.weight",), Kind.VOCAB),
)
VALUE_HEAD = ("value_head.weight", "value_head.bias")
"""[1, hidden] and [1], for a model that has one; not in the released files. Both formats call them the same."""
_VALUE_HEAD = tuple(Entry(name, (name,), Kind.REPLICATED) for name in VALUE_HEAD)


@lru_cache(maxsize=8)
def entries(config: Step1Config) -> dict[str, Entry]:
    """Megatron name -> entry for the whole model, in the order of the forward."""
    layers = [entry.of_layer(i) for i in range(config.num_hidden_layers) for entry in _LAYER]
    after = (*_AFTER, *_VALUE_HEAD) if config.value_head else _AFTER
    return {entry.megatron: entry for entry in (*_BEFORE, *layers, *after)}


def hf_shapes(config: Step1Config) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every weight, in the order of the forward."""
    return {name: _hf_shape(name, config) for entry in entries(config).values() for name in entry.hf}


def num_parameters(config: Step1Config) -> int:
    """Parameters of the whole model, without padding."""
    return sum(torch.Size(shape).numel() for shape in hf_shapes(config).values())


def to_megatron(
    name: str,
    hf_tensors: Mapping[str, Tensor],
    config: Step1Config,
    tp_rank: int = 0,
    tp_size: int = 1,
    padded_vocab: int | None = None,
) -> Tensor:
    """One rank's part of the Megatron tensor `name`.

    Args:
        name: Megatron name with the layer's number in the whole model.
        hf_tensors: Hugging Face name -> full tensor; only the ones needed are asked for.
        padded_vocab: rows of the whole padded embedding; None for no padding.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a shape does not fit.
    """
    entry = entries(config)[name]
    parts = [checked(hf_tensors, part, _hf_shape(part, config)) for part in entry.hf]
    if entry.kind is Kind.REPLICATED:
        return parts[0]
    if entry.kind is Kind.ROW:
        return parts[0].chunk(tp_size, dim=1)[tp_rank]
    if entry.kind is Kind.GATE_UP:
        return torch.cat([part.chunk(tp_size)[tp_rank] for part in parts])
    if entry.kind is Kind.QKV:
        mine = [part.unflatten(0, (config.num_attention_groups, -1)).chunk(tp_size)[tp_rank] for part in parts]
        return torch.cat(mine, dim=1).flatten(0, 1)
    rows = vocab_rows(config, tp_rank, tp_size, padded_vocab)
    real = parts[0][rows.start : min(rows.stop, config.vocab_size)]
    padding = real.new_zeros(len(rows) - real.shape[0], real.shape[1])
    return torch.cat([real, padding])


def from_megatron(name: str, shards: Sequence[Tensor], config: Step1Config) -> dict[str, Tensor]:
    """The Hugging Face tensors that the tensor-parallel ranks' `shards` of `name` make up; the inverse of
    `to_megatron`. Padding rows are dropped."""
    entry = entries(config)[name]
    if entry.kind is Kind.REPLICATED:
        return {entry.hf[0]: shards[0]}
    if entry.kind is Kind.ROW:
        return {entry.hf[0]: torch.cat(list(shards), dim=1)}
    if entry.kind is Kind.VOCAB:
        return {entry.hf[0]: torch.cat(list(shards))[: config.vocab_size]}
    if entry.kind is Kind.GATE_UP:
        halves = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return {part: torch.cat(half) for part, half in zip(entry.hf, halves, strict=True)}
    grouped = torch.cat(list(shards)).unflatten(0, (config.num_attention_groups, -1))
    heads_per_group = config.num_attention_heads // config.num_attention_groups
    sizes = [heads_per_group * config.head_dim, config.head_dim, config.head_dim]
    split = grouped.split(sizes, dim=1)
    return {part: piece.flatten(0, 1) for part, piece in zip(entry.hf, split, strict=True)}


def checked(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """One tensor of `weights`; zeros for a value head that is not there, which is a new one.

    Raises:
        KeyError: it is missing.
        ValueError: it has another shape; the message names the tensor and both shapes.
    """
    # Not `in`: a mapping that builds tensors on demand would build this one twice.
    try:
        tensor = weights[name]
    except KeyError:
        if name in VALUE_HEAD:
            return torch.zeros(shape)
        raise KeyError(f"weight {name!r} is missing") from None
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"weight {name!r} has shape {tuple(tensor.shape)}, the model needs {tuple(shape)}")
    return tensor


def vocab_rows(config: Step1Config, tp_rank: int, tp_size: int, padded_vocab: int | None = None) -> range:
    """Rows of the padded vocabulary that a rank holds; those from `config.vocab_size` on are padding."""
    padded = config.vocab_size if padded_vocab is None else padded_vocab
    if padded % tp_size:
        raise ValueError(f"{padded} vocabulary rows cannot be cut over {tp_size} ranks; pad them to a multiple")
    per_rank = padded // tp_size
    return range(tp_rank * per_rank, (tp_rank + 1) * per_rank)


def _hf_shape(name: str, config: Step1Config) -> tuple[int, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    if name in VALUE_HEAD:
        return (1, hidden) if name.endswith("weight") else (1,)
    keys = config.num_attention_groups * config.head_dim
    shapes = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (config.num_attention_heads * config.head_dim, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, config.num_attention_heads * config.head_dim),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return shapes.get(name.split(".")[-2], (hidden,))
