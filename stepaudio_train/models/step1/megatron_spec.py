"""Step-1 out of Megatron-Core's parts: tensor- and sequence-parallel layers, one pipeline stage at a time.

Shapes: T tokens a row (cut by tensor parallelism where sequence parallelism is on), R rows, h hidden size.
"""

from __future__ import annotations

from collections import OrderedDict

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

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.models.step1.attention import (
    AttentionBias,
    alibi_slopes,
    build_attention_bias,
    sqrt_alibi_attention,
)
from stepaudio_train.models.step1.vocab_parallel import target_log_probs


class BiasCache:
    """Attention biases of the micro-batches in flight, so that each is built once and not once a layer.

    Megatron hands every layer the micro-batch's document numbers in place of an attention mask: a tensor is all that
    survives its activation checkpointing. They are recognised by the memory they lie in, which cannot be reused while
    the cache holds on to them.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[tuple[int, torch.dtype], tuple[Tensor, AttentionBias]] = OrderedDict()

    def get(self, documents: Tensor, slopes: Tensor, dtype: torch.dtype) -> AttentionBias:
        """Bias for `documents` [R, T] int32."""
        key = (documents.data_ptr(), dtype)
        if key not in self._entries:
            if len(self._entries) == self._max_entries:
                self._entries.popitem(last=False)
            self._entries[key] = (documents, build_attention_bias(documents, slopes, dtype))
        return self._entries[key][1]

    def clear(self) -> None:
        self._entries.clear()


class SqrtAlibiCoreAttention(MegatronModule):
    """Megatron's core attention: this rank's heads of the square-root ALiBi attention."""

    def __init__(
        self,
        config: TransformerConfig,
        bias_cache: BiasCache,
        pg_collection: ProcessGroupCollection,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config)
        slopes = alibi_slopes(config.num_attention_heads)
        mine = slopes.chunk(pg_collection.tp.size())[pg_collection.tp.rank()]
        self.register_buffer("slopes", mine.clone(), persistent=False)
        # Megatron's modules keep floating buffers in the parameters' dtype; the slopes have to stay fp32.
        self.slopes_fp32 = mine.clone()
        self.bias_cache = bias_cache

    def forward(self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor, **_: object) -> Tensor:
        """query [T, R, heads, head_dim], key and value [T, R, groups, head_dim], documents [R, T] -> [T, R, width]."""
        bias = self.bias_cache.get(documents, self.slopes_fp32, query.dtype)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        return sqrt_alibi_attention(q, k, v, bias).transpose(0, 1).flatten(2)
