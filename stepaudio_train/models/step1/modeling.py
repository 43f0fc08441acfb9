"""Step-1 on one device, in plain PyTorch, with the released parameter names (paper 3.2, released modeling_step1.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from stepaudio_train.config.schema import Recompute, Step1Config
from stepaudio_train.models.step1 import fused
from stepaudio_train.models.step1.attention import (
    AttentionBias,
    alibi_slopes,
    build_attention_bias,
    sqrt_alibi_attention,
)
from stepaudio_train.models.step1.offload import kept_on_host
from stepaudio_train.models.step1.vocab_parallel import target_log_probs

RELEASED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_attention_groups",
    "num_hidden_layers",
    "vocab_size",
    "max_seq_len",
    "rms_norm_eps",
)


class KVCache:
    """Keys and values of the tokens already seen, layer by layer."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Cached positions."""
        return 0 if self.keys[0] is None else self.keys[0].shape[1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [R, T, G, D] of `layer`; return all of that layer's."""
        old_k, old_v = self.keys[layer], self.values[layer]
        self.keys[layer] = k if old_k is None else torch.cat([old_k, k], dim=1)
        self.values[layer] = v if old_v is None else torch.cat([old_v, v], dim=1)
        return self.keys[layer], self.values[layer]  # type: ignore[return-value]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares in float32 (in float64 for float64 inputs)."""

    fused_norm = False
    """Set by models/step1/fused.py."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_norm:
            return fused.rms_norm(x, self.weight, self.eps)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with the square-root ALiBi bias; no position embedding, no biases."""

    def __init__(self, config: Step1Config, layer: int) -> None:
        super().__init__()
        h, kv = config.hidden_size, config.num_attention_groups * config.head_dim
        self.head_dim, self.layer = config.head_dim, layer
        self.q_proj = nn.Linear(h, h, bias=False)
        self.k_proj = nn.Linear(h, kv, bias=False)
        self.v_proj = nn.Linear(h, kv, bias=False)
        self.o_proj = nn.Linear(h, h, bias=False)

    def forward(self, x: Tensor, bias: AttentionBias, cache: KVCache | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.o_proj(sqrt_alibi_attention(q, k, v, bias).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    fused_swiglu = False
    """Set by models/step1/fused.py."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_swiglu:
            return self.down_proj(fused.swiglu(self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: Step1Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, bias: AttentionBias, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), bias, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Step1Model(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("slopes", alibi_slopes(config.num_attention_heads), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """Hidden states after the final norm, [R, T, hidden]. Arguments as in `Step1ForCausalLM.forward`."""
        x = self.embed_tokens(input_ids)
        if documents is None:
            past = cache.length if cache is not None else 0
            documents = torch.zeros(input_ids.shape[0], past + input_ids.shape[1], dtype=torch.int32, device=x.device)
        # Under autocast the embedding stays fp32, but queries and keys do not; the bias has to match those.
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        num_queries = input_ids.shape[1]
        bias = build_attention_bias(documents, self.slopes, dtype, num_queries=num_queries, head_dim=self.head_dim)
        for layer in self.layers:
            if recompute == "none":
                x = layer(x, bias, cache)
                continue
            with kept_on_host() if recompute == "offload" else nullcontext():
                x = torch.utils.checkpoint.checkpoint(layer, x, bias, cache, use_reentrant=False)
        return self.norm(x)


class ValueHead(nn.Linear):
    """Hidden states after the final norm [..., h] -> values [...], computed in float32 (in float64 for float64)."""

    def __init__(self, hidden_size: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(hidden_size, 1, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight, bias = (_at_least_float32(x) for x in (hidden, self.weight, self.bias))
            return linear(hidden, weight, bias).squeeze(-1)


class Step1ForCausalLM(nn.Module):
    """The language model; `lm_head` is not tied to the embedding, as in the released files."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.config = config
        self.model = Step1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.value_head = ValueHead(config.hidden_size) if config.value_head else None

    def new_cache(self) -> KVCache:
        return KVCache(self.config.num_hidden_layers)

    def forward(self, input_ids: Tensor, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits.

        Args:
            input_ids: [R, T] int64, the new tokens.
            documents: [R, P + T] int, of the P cached and the T new positions: a token sees those of its own
                document at or before it. Left padding is a document of its own, such as -1. None: one document a row.
            cache: keys and values of earlier calls; extended in place.

        Returns:
            [R, T, vocab_size].
        """
        return self.lm_head(self.model(input_ids, documents, cache))

    def log_probs(
        self, input_ids: Tensor, targets: Tensor, documents: Tensor, wanted: Tensor, recompute: Recompute = "none"
    ) -> Tensor:
        """Log-probability of each target, [R, T] float32 (float64 for a float64 model); 0 where not `wanted`.

        All arguments are [R, T]; `wanted` is bool. The head is computed for the wanted tokens alone.
        """
        return self.token_outputs(input_ids, targets, documents, wanted, recompute=recompute)[0]

    def token_outputs(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Tensor,
        wanted: Tensor,
        entropies: bool = False,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities as in `log_probs`; with `entropies`, those of the whole distributions in nats, 0 where not
        `wanted`; values of all tokens where there is a value head. [R, T] each."""
        hidden = self.model(input_ids, documents, recompute=recompute)
        chosen = target_log_probs(hidden[wanted], self.lm_head.weight, targets[wanted], entropies=entropies)
        log_probs, found = (None if x is None else x.new_zeros(wanted.shape).masked_scatter(wanted, x) for x in chosen)
        return log_probs, found, self.value_head(hidden) if self.value_head is not None else None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Step1ForCausalLM:
        """Read config.json and *.safetensors of a Hugging Face directory; weights in float32, in eval mode.

        Raises:
            FileNotFoundError: no config.json there.
            RuntimeError: tensors are missing or do not fit; PyTorch names them.
        """
        directory = Path(directory)
        weights: dict[str, Tensor] = {}
        for shard in sorted(directory.glob("*.safetensors")):
            weights.update(load_file(shard))
        config = read_released_config(directory)
        return cls.of_weights(config, {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()})

    @classmethod
    def of_weights(cls, config: Step1Config, weights: Mapping[str, Tensor]) -> Step1ForCausalLM:
        """The model, in eval mode, whose parameters are these CPU tensors themselves: nothing is copied or drawn.

        Raises:
            RuntimeError: tensors are missing or do not fit; PyTorch names them.
        """
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        # No checkpoint holds the slopes.
        model.model.slopes = alibi_slopes(config.num_attention_heads)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, all that `from_pretrained` reads."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = json.dumps(released_config(self.config), indent=2) + "\n"
        (directory / "config.json").write_text(config, encoding="utf-8")
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_released_config(directory: Path) -> Step1Config:
    """The model's sizes from a Hugging Face directory's config.json; other fields are not needed here."""
    return model_of_fields(json.loads((directory / "config.json").read_text(encoding="utf-8")))


def model_of_fields(fields: Mapping[str, Any]) -> Step1Config:
    """The model that a config.json describes.

    Raises:
        KeyError: a size is missing.
    """
    return Step1Config(
        **{name: fields[name] for name in RELEASED_FIELDS}, value_head=bool(fields.get("value_head", False))
    )


def released_config(config: Step1Config) -> dict[str, Any]:
    """The model's part of a Hugging Face directory's config.json. `tie_word_embeddings` is always there, since its
    absence is read as true by some versions of transformers and vLLM, which then replace the head by the embedding."""
    return {
        "architectures": ["Step1ForCausalLM"],
        "model_type": "step1",
        **{name: getattr(config, name) for name in RELEASED_FIELDS},
        **({"value_head": True} if config.value_head else {}),
        "bos_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": 3,
        "tie_word_embeddings": False,
    }


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
