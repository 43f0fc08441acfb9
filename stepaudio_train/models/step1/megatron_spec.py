"""Step-1 out of Megatron-Core's parts: tensor- and sequence-parallel layers, one pipeline stage at a time.

Shapes: T tokens a row, R rows, h hidden size. Inside, hidden states are [T, R, h], with T cut over the tensor-parallel
ranks where there are several (sequence parallelism). With context parallelism, T of them are a rank's own tokens of a
row (context_parallel.py), but for what the objective sees.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from stepaudio_train.config.schema import Recompute, Step1Config
from stepaudio_train.models.step1 import fused
from stepaudio_train.models.step1.attention import (
    AttentionBias,
    alibi_slopes,
    build_attention_bias,
    sqrt_alibi_attention,
)
from stepaudio_train.models.step1.context_parallel import ContextParallel
from stepaudio_train.models.step1.modeling import ValueHead
from stepaudio_train.models.step1.offload import kept_on_host
from stepaudio_train.models.step1.vocab_parallel import target_log_probs
from stepaudio_train.models.step1.weight_map import vocab_rows


class BiasCache:
    """Attention biases of the micro-batches in flight, so that each is built once and not once a layer.

    Megatron hands every layer the micro-batch's document numbers in place of an attention mask, since a tensor is all
    that survives its activation checkpointing. A tensor is recognised by the memory it lies in, which cannot be reused
    while the cache holds on to it.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[tuple[int, torch.Size, torch.dtype], tuple[Tensor, AttentionBias]] = OrderedDict()

    def get(
        self, documents: Tensor, slopes: Tensor, num_queries: int, dtype: torch.dtype, head_dim: int
    ) -> AttentionBias:
        """Bias for the last `num_queries` positions of `documents` [R, S] int32, `slopes` [heads of this rank] and
        queries of `dtype` and `head_dim`."""
        key = (documents.data_ptr(), documents.shape, dtype)
        if key not in self._entries:
            if len(self._entries) == self._max_entries:
                self._entries.popitem(last=False)
            bias = build_attention_bias(documents, slopes, dtype, num_queries=num_queries, head_dim=head_dim)
            self._entries[key] = (documents, bias)
        return self._entries[key][1]

    def clear(self) -> None:
        """Forget all; call it when the step's micro-batches are done."""
        self._entries.clear()


class SqrtAlibiCoreAttention(MegatronModule):
    """Megatron's core attention: this rank's heads of the square-root ALiBi attention."""

    slopes: Tensor

    def __init__(
        self, config: TransformerConfig, bias_cache: BiasCache, pg_collection: ProcessGroupCollection, **_: object
    ) -> None:
        super().__init__(config)
        tp = pg_collection.tp
        slopes = alibi_slopes(config.num_attention_heads).chunk(tp.size())[tp.rank()]
        self.register_buffer("slopes", slopes, persistent=False)
        self._bias_cache, self._context = bias_cache, ContextParallel(pg_collection.cp)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor, **_: object) -> Tensor:
        """query [T, R, heads, D], key and value [T, R, groups, D], documents [R, S] of whole rows ->
        [T, R, heads * D]."""
        key, value = self._context.keys_and_values(key, value)
        parts = []
        for queries, end in self._context.queries(query):
            bias = self._bias_cache.get(
                documents[:, :end], self.slopes, len(queries), query.dtype, head_dim=query.shape[-1]
            )
            q, k, v = (x.transpose(0, 1) for x in (queries, key[:end], value[:end]))
            parts.append(sqrt_alibi_attention(q, k, v, bias).transpose(0, 1).flatten(2))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class SequenceParallelRMSNorm(nn.Module):
    """x / rms(x) * weight. Megatron's own wrapper of torch's norm refuses sequence parallelism."""

    fused_norm = False
    """Set by models/step1/fused.py."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # With this mark Megatron sums the weight's gradient over the ranks that share the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_norm:
            return fused.rms_norm(x, self.weight, self.eps)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class VocabParallelHead(tensor_parallel.ColumnParallelLinear):
    """The LM head, fused with the log-probability of the targets: the whole logits never exist in fp32."""

    def __init__(
        self, config: TransformerConfig, model: Step1Config, padded_vocab: int, tp: torch.distributed.ProcessGroup
    ):
        super().__init__(
            config.hidden_size, padded_vocab, config=config, init_method=config.init_method, bias=False, tp_group=tp
        )
        rows = vocab_rows(model, tp.rank(), tp.size(), padded_vocab)
        self._first_row = rows.start
        self._num_real_rows = min(rows.stop, model.vocab_size) - rows.start

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor, wanted: Tensor, entropies: bool
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [T, R, h], targets [R, T], wanted [R, T] bool -> log-probabilities and, if asked for, entropies, both
        [R, T] float32, 0 if unwanted."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        hidden, targets = hidden.flatten(0, 1), targets.t().flatten()
        chosen = wanted.t().flatten().nonzero().squeeze(1)
        if len(chosen) < len(targets):
            hidden, targets = hidden.index_select(0, chosen), targets.index_select(0, chosen)
        real = self.weight[: self._num_real_rows]
        log_probs, found = target_log_probs(hidden, real, targets, self._first_row, self.tp_group, entropies)

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(wanted.numel()).index_copy(0, chosen, values).view(wanted.t().shape).t()

        return placed(log_probs), placed(found) if found is not None else None


class SequenceParallelValueHead(ValueHead):
    """The value head on this rank's part of the sequence; every rank gets the values of all tokens."""

    def __init__(self, config: TransformerConfig, tp: torch.distributed.ProcessGroup) -> None:
        super().__init__(config.hidden_size, dtype=config.params_dtype)
        # With this mark Megatron sums the gradients over the ranks that share the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._config, self._tp = config, tp

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [T of this rank, R, h] -> values [R, T] float32."""
        values = super().forward(hidden)
        if self._config.sequence_parallel:
            # All ranks compute the same loss of them: each takes its own tokens' gradient, nothing is added up.
            values = tensor_parallel.gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self._tp
            )
        return values.t()


class Step1MegatronModel(LanguageModule):
    """One pipeline stage: embedding (first stage), layers, head (last stage)."""

    def __init__(
        self,
        config: TransformerConfig,
        model: Step1Config,
        padded_vocab: int,
        bias_cache: BiasCache,
        recompute: Recompute,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self._context = ContextParallel(self.pg_collection.cp)
        # What is kept, and what is not, Megatron-Core has out of its configuration.
        self._kept_on_host = recompute == "offload"
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, padded_vocab, model.max_seq_len, position_embedding_type="none", tp_group=self.tp_group
            )
        self.decoder = TransformerBlock(
            config,
            _block_spec(config, bias_cache, vp_stage, self.pp_group.rank()),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = VocabParallelHead(config, model, padded_vocab, self.tp_group)
            self.value_head = SequenceParallelValueHead(config, self.tp_group) if model.value_head else None
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        _mark_shared_out(self)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """What the pipeline schedule received from the stage before."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(
        self, input_ids: Tensor, documents: Tensor, targets: Tensor, wanted: Tensor, entropies: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
        """All tensors [R, T] of whole rows. Hidden states before the last stage; on it, of all tokens, as
        `Step1ForCausalLM.token_outputs`."""
        hidden = self.embedding(self._context.own(input_ids), None) if self.pre_process else None
        with kept_on_host() if self._kept_on_host else nullcontext():
            hidden = self.decoder(hidden_states=hidden, attention_mask=documents)
        if not self.post_process:
            return hidden
        own = self.output_layer(hidden, self._context.own(targets), self._context.own(wanted), entropies)
        values = self.value_head(hidden) if self.value_head is not None else None
        log_probs, found, values = (
            self._context.whole(x.t(), same_use=True).t() if x is not None else None for x in (*own, values)
        )
        return log_probs, found, values  # type: ignore[return-value]


def _mark_shared_out(model: nn.Module) -> None:
    """Say which weights are cut over the tensor-parallel ranks: the gradient norm counts the others once. Megatron-Core
    does so itself only where it draws initial values."""
    cut_dims = {
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in model.modules():
        for kind, dim in cut_dims.items():
            if isinstance(module, kind):
                tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _block_spec(
    config: TransformerConfig, bias_cache: BiasCache, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=SequenceParallelRMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=tensor_parallel.ColumnParallelLinear,
                    core_attention=partial(SqrtAlibiCoreAttention, bias_cache=bias_cache),
                    linear_proj=tensor_parallel.RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=SequenceParallelRMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=tensor_parallel.ColumnParallelLinear, linear_fc2=tensor_parallel.RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=SequenceParallelRMSNorm)
