"""Step-1 for transformers 4.48 and later (`trust_remote_code=True`): a decoder with square-root ALiBi.

There is no position embedding. Head h adds -slope_h * sqrt(i - j) to the score of query i and key j <= i. The bias is
of distances, so padding on either side shifts nothing: `attention_mask` only hides keys.

`attn_implementation`: `sdpa` (default) and `eager` hold the bias of all pairs, [batch, heads, queries, keys];
`flex_attention` never does, so take it for long sequences on CUDA. It is computed as `sdpa` elsewhere, since
FlexAttention has no backward on a CPU, and for the single queries of decoding.
"""

import math
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_step1 import Step1Config

# transformers 5.24 renamed what it hands to forward and wants back; older code still asks for the old name.
_CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def sqrt_alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """Slopes of the heads, [H] float32: 2^(-8k/n) for the n = 2^floor(log2 H) first heads, then the odd members of the
    series for 2n."""
    n = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-8.0 * k / n) for k in range(1, n + 1)]
    rest = [2.0 ** (-4.0 * k / n) for k in range(1, 2 * (num_heads - n), 2)]
    return torch.tensor(first + rest, dtype=torch.float32, device=device)


def dense_bias(keep: Tensor | None, slopes: Tensor, num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """Bias of the last `num_queries` of `num_keys` positions, [1 or B, H, T, S] of `dtype`; -inf where hidden.

    Every position sees itself, padding too: a row that sees nothing would be NaN.

    Args:
        keep: [B, S] bool, false at padding; None for no padding.
        slopes: [H] float32.
    """
    keys = torch.arange(num_keys, device=slopes.device)
    distance = keys[num_keys - num_queries :, None] - keys
    root = distance.clamp(min=0).to(torch.float32).sqrt()
    # As released: computed in float32, then rounded to the dtype of the queries.
    bias = (-slopes[:, None, None] * root).to(dtype)[None]
    visible = (distance >= 0)[None]
    if keep is not None:
        visible = visible & (keep[:, None, :] | (distance == 0))
    return bias.masked_fill(~visible[:, None], float("-inf"))


def block_mask(keep: Tensor | None, length: int, device: torch.device) -> BlockMask:
    """The pairs that `dense_bias` leaves visible, for whole rows of `length` tokens."""

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def causal_and_kept(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (keep[row, key] | (key == query))

    if keep is None:
        return create_block_mask(causal, None, None, length, length, device=device)
    return create_block_mask(causal_and_kept, keep.shape[0], None, length, length, device=device)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The formula as it reads. query [B, H, T, D], key and value [B, H, S, D] -> [B, H, T, D]."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def flex_sqrt_alibi(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, mask: BlockMask) -> Tensor:
    """The same without the bias of all pairs. query [B, H, T, D], key and value [B, G, T, D] -> [B, H, T, D]."""
    gqa = query.shape[1] != key.shape[1]
    return _compiled_flex()(query, key, value, partial(_score, slopes=slopes), mask, enable_gqa=gqa)


def _score(value: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor, *, slopes: Tensor) -> Tensor:
    # Clamped: hidden pairs pass through here too, and sqrt of a negative would poison the backward.
    return value - slopes[head] * (query - key).clamp(min=0).to(torch.float32).sqrt()


@cache
def _compiled_flex():
    return torch.compile(flex_attention)


class Step1RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Step1Attention(nn.Module):
    """Grouped-query attention; query head h reads key/value head h // (H / G)."""

    def __init__(self, config: Step1Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        inner = config.num_attention_groups * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, bias: Tensor | BlockMask, slopes: Tensor, past_key_values: DynamicCache | None = None
    ) -> Tensor:
        """x [B, T, hidden] -> the same shape."""
        head_dim = self.config.head_dim
        query, key, value = (
            project(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if key.shape[2] != bias.shape[-1]:
            raise ValueError("the cache must hold seen tokens alone, as DynamicCache does; static caches do not")
        if isinstance(bias, BlockMask):
            out = flex_sqrt_alibi(query, key, value, slopes, bias)
        else:
            # Repeated by hand: with a bias, torch's memory-efficient kernel takes no grouped heads.
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
            if self.config._attn_implementation == "eager":
                out = eager_attention(query, key, value, bias)
            else:
                out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Step1MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Step1Layer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: Step1Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Step1Attention(config, layer_idx)
        self.mlp = Step1MLP(config)
        self.input_layernorm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, bias: Tensor | BlockMask, slopes: Tensor, past_key_values: DynamicCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), bias, slopes, past_key_values=past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


class Step1PreTrainedModel(PreTrainedModel):
    """What transformers asks of every Step-1 model."""

    config_class = Step1Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # No `_tied_weights_keys`: its form differs between 4.x and 5.x, and nothing is tied.
    _no_split_modules = ["Step1Layer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    # Backends that are plugged in from outside know no bias by distance, and would leave it out in silence.
    _supports_attention_backend = False
    _supports_cache_class = True
    _supports_static_cache = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers 5 guesses from the source; every forward reads the configuration anew.
        return True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Step1RMSNorm):
            nn.init.ones_(module.weight)


class Step1Model(Step1PreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: Step1Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Step1Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states after the final norm. Arguments as in `Step1ForCausalLM.forward`."""
        if output_attentions:
            raise ValueError("Step-1 returns no attention weights; leave output_attentions out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values if cache is None else cache
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        wanted = self.config.use_cache if use_cache is None else use_cache
        if recompute:
            # A layer that runs a second time would append its keys a second time.
            past, wanted = None, False
        if wanted and past is None:
            past = DynamicCache()
        slopes = sqrt_alibi_slopes(self.config.num_attention_heads, x.device)
        bias = self._bias(x, attention_mask, slopes, past.get_seq_length() if past is not None else 0)
        states = ()
        for layer in self.layers:
            if output_hidden_states:
                states += (x,)
            if recompute:
                x = self._gradient_checkpointing_func(layer.__call__, x, bias, slopes)
            else:
                x = layer(x, bias, slopes, past_key_values=past)
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states, x) if output_hidden_states else None,
            **{_CACHE_FIELD: past if wanted else None},
        )
        return output.to_tuple() if return_dict is False else output

    def _bias(self, x: Tensor, attention_mask: Tensor | None, slopes: Tensor, past_len: int) -> Tensor | BlockMask:
        """Bias and mask of all layers."""
        num_queries, num_keys = x.shape[1], past_len + x.shape[1]
        if attention_mask is not None and attention_mask.shape != (x.shape[0], num_keys):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, must be [batch, cached + new tokens] = "
                f"{(x.shape[0], num_keys)}; static caches and masks of pairs are not supported"
            )
        keep = None if attention_mask is None else attention_mask.bool()
        if self.config._attn_implementation == "flex_attention" and x.is_cuda and not past_len:
            return block_mask(keep, num_keys, x.device)
        # Under autocast the embedding stays float32, but queries do not; the bias has to match those.
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        return dense_bias(keep, slopes, num_queries, num_keys, dtype)


class Step1ForCausalLM(Step1PreTrainedModel, GenerationMixin):
    """The language model; `lm_head` is never tied to the embedding. With `config.value_head`, the values of tokens are
    `model.value_head(model.model(input_ids).last_hidden_state)`, [B, T, 1]."""

    def __init__(self, config: Step1Config) -> None:
        # Again: what the caller of from_pretrained sets is set after the configuration was checked.
        config.require_untied()
        super().__init__(config)
        self.model = Step1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.value_head:
            self.value_head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: [B, T] int64, the new tokens.
            attention_mask: [B, cached + T], 0 at padding, on either side; None for no padding.
            past_key_values: keys and values of earlier calls, extended in place.
            cache: the same, under the name that transformers 5.24 gave it.
            inputs_embeds: [B, T, hidden], in place of input_ids.
            labels: [B, T] int64, not shifted; -100 does not count.
            logits_to_keep: logits of the last so many tokens, or of these positions; 0 for all.
            num_logits_to_keep: the same, under the name of transformers 4.48.
            kwargs: `num_items_in_batch` divides the summed loss, in place of the mean; the rest has no effect.

        Returns:
            Logits [B, T or fewer, vocab_size] of the model's dtype; loss [] float32.

        Raises:
            ValueError: the mask's shape does not fit, or attention weights are asked for.
        """
        output = self.model(
            input_ids,
            attention_mask,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden = output.last_hidden_state
        kept = num_logits_to_keep or logits_to_keep
        if isinstance(kept, int):
            kept = slice(-kept if kept else None, None)
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{_CACHE_FIELD: output.get(_CACHE_FIELD)},
        )
        return result.to_tuple() if return_dict is False else result


# So that save_pretrained copies this file along; transformers 4.48 does it of itself for the configuration alone.
Step1ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
