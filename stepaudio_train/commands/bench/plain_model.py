"""The same language model as one would write it with transformers alone: a PreTrainedModel with its loss.

Attention follows the released modelling code: the square-root ALiBi bias is written out anew in every layer, keys and
values are repeated for the query heads; the mask between packed documents, which the released code lacks, is added to
it. What the project is compared with: `stepaudio bench step`, and benchmarks/training.py under transformers' Trainer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention, silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from stepaudio_train.models.step1.attention import alibi_slopes

IGNORED = -100
"""Label of what is not to be predicted, as everywhere in transformers."""


class PlainConfig(PretrainedConfig):
    """Sizes under their released names."""

    model_type = "step1_plain"

    def __init__(self, sizes: dict[str, int | float] | None = None, **kwargs) -> None:
        super().__init__(tie_word_embeddings=False, **kwargs)
        self.sizes = sizes or {}


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, hidden // heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (p(x).view(rows, length, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=2) for t in (k, v))
        positions = torch.arange(length, device=x.device)
        distance = positions[:, None] - positions[None, :]
        slopes = alibi_slopes(self.heads).to(x.device)
        bias = -slopes[:, None, None] * distance.clamp(min=0).sqrt()
        visible = (distance >= 0) & (documents[:, :, None] == documents[:, None, :])
        bias = bias[None].masked_fill(~visible[:, None], float("-inf")).to(x.dtype)
        out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class _MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, sizes: dict) -> None:
        super().__init__()
        hidden, eps = sizes["hidden_size"], sizes["rms_norm_eps"]
        self.self_attn = _Attention(hidden, sizes["num_attention_heads"], sizes["num_attention_groups"])
        self.mlp = _MLP(hidden, sizes["intermediate_size"])
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), documents)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Decoder(nn.Module):
    def __init__(self, sizes: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes["vocab_size"], sizes["hidden_size"])
        self.layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes["num_hidden_layers"]))
        self.norm = nn.RMSNorm(sizes["hidden_size"], sizes["rms_norm_eps"])

    def forward(self, input_ids: Tensor, documents: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, documents)
        return self.norm(x)


class PlainForCausalLM(PreTrainedModel):
    """Step-1's architecture, its parameters under their released names."""

    config_class = PlainConfig
    accepts_loss_kwargs = True
    """Trainer then hands over the number of targets of the whole batch, and the loss is a mean over all of them."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.model = _Decoder(config.sizes)
        self.lm_head = nn.Linear(config.sizes["hidden_size"], config.sizes["vocab_size"], bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the weights are loaded."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        documents: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """All [R, T]; `labels` are the ids themselves, -100 where one is not to be predicted."""
        logits = self.lm_head(self.model(input_ids, documents))
        following = pad(labels, (0, 1), value=IGNORED)[:, 1:]
        total = cross_entropy(logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count, logits=None)
