"""Proof that two folders hold the same model: every weight bit for bit, and the logits of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.megatron_files import layer_of
from stepaudio_train.convert.sources import WeightReader
from stepaudio_train.convert.tensor_files import WeightError
from stepaudio_train.models.step1.attention import alibi_slopes, build_attention_bias
from stepaudio_train.models.step1.modeling import DecoderLayer, RMSNorm
from stepaudio_train.models.step1.weight_map import Entry, entries

_NUM_TOKENS = 16


@dataclass(frozen=True)
class Verification:
    """Two sets of weights were equal."""

    num_tensors: int
    logits_difference: float
    """Largest, over `_NUM_TOKENS` positions, of the same forward in fp32 on both."""


def verify(expected: WeightReader, found: WeightReader, model: Step1Config, progress: bool = True) -> Verification:
    """Compare every tensor bit for bit, and run one forward with each side's weights, a layer in memory at a time.

    Raises:
        WeightError: naming the first tensor that differs.
    """
    table = list(entries(model).values())
    ids = torch.arange(_NUM_TOKENS) * 7919 % model.vocab_size
    sides = (_StreamedForward(model, ids), _StreamedForward(model, ids))
    num_tensors = 0
    for entry in tqdm(table, desc="verify", unit="entry", disable=not progress, dynamic_ncols=True):
        tensors = expected.read(entry), found.read(entry)
        for name, tensor in tensors[0].items():
            other = tensors[1][name].to(tensor.dtype)
            if not _same_bits(tensor, other):
                wrong = int((tensor != other).sum())
                raise WeightError(f"{name}: {wrong:,} of {tensor.numel():,} values differ; convert it again")
            num_tensors += 1
        for side, own in zip(sides, tensors, strict=True):
            side.feed(entry, own)
    difference = (sides[0].logits - sides[1].logits).abs().max()
    if not bool(difference == 0):
        raise WeightError(f"the logits differ by {float(difference):.3g}, though no weight does")
    return Verification(num_tensors, float(difference))


class _StreamedForward:
    """A forward pass that is given the weights in the order of the map, and keeps those of one layer."""

    def __init__(self, model: Step1Config, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        self._slopes = alibi_slopes(model.num_attention_heads)
        self._bias = build_attention_bias(torch.zeros(1, len(ids), dtype=torch.int32), self._slopes, torch.float32)
        self._layer = DecoderLayer(model, 0)
        self._hidden = torch.empty(0)
        self._held: dict[str, Tensor] = {}
        self.logits = torch.empty(0)
        """[1, tokens, vocabulary] float32, once all is fed."""

    @torch.no_grad()
    def feed(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        """Take the next entry, and compute what can be computed with it."""
        layer = layer_of(entry)
        if layer is not None:
            prefix = f"model.layers.{layer}."
            self._held |= {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()}
            if entry.hf[0].endswith("mlp.down_proj.weight"):
                self._layer.load_state_dict(self._held)
                self._hidden = self._layer(self._hidden, self._bias, None)
                self._held = {}
            return
        ((name, tensor),) = tensors.items()
        if name == "model.embed_tokens.weight":
            self._hidden = tensor[self._ids].float()[None]
        elif name == "model.norm.weight":
            norm = RMSNorm(self._model.hidden_size, self._model.rms_norm_eps)
            norm.weight.copy_(tensor)
            self._hidden = norm(self._hidden)
        elif name == "lm_head.weight":
            self.logits = nn.functional.linear(self._hidden, tensor.float())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # NaNs are equal when their bits are.
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
