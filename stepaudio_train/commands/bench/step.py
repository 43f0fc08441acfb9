"""`stepaudio bench step`: a whole training step, beside the plain transformers loops that one would write instead.

All train the same model on the same documents: forward, backward, clipping and a fused AdamW. What differs is how:

- the project's engines: one packed row;
- transformers, padded: the exported model, each document a row of its own, filled up to the longest, as transformers'
  data collators do; logits of all tokens;
- transformers, packed: StepFun's modelling code with a mask for the row's documents; logits of all tokens;
- Llama of transformers, padded: RoPE in place of the bias, so other weights and another loss.

The first losses have to agree, or the comparison means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from stepaudio_train.commands.bench.cases import (
    BenchOptions,
    Case,
    build_case,
    leave_process_group,
    products,
    products_flops,
    rows_of,
)
from stepaudio_train.commands.bench.plain_model import IGNORED, PlainConfig, PlainForCausalLM
from stepaudio_train.commands.bench.reporting import report
from stepaudio_train.commands.bench.timing import Contender, Work, time_in_turns
from stepaudio_train.config.errors import UserError
from stepaudio_train.convert.hub.configuration_step1 import Step1Config as ExportedConfig
from stepaudio_train.convert.hub.modeling_step1 import Step1ForCausalLM as ExportedModel
from stepaudio_train.engines.build import build_engine
from stepaudio_train.engines.hf_model import adamw_options
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import released_config
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.tokenizers.vocabulary import PAD_ID, Vocabulary
from stepaudio_train.training.throughput import training_flops

_LOSS_TOLERANCE = 1e-2
"""Relative, at the first step: bf16 rounds differently along each way."""
_OTHER_MODEL = "Llama, padded"


def bench_step(options: BenchOptions) -> int:
    """Print and write the table; the exit status.

    Raises:
        UserError: two ways whose weights are the same found other losses.
    """
    case = build_case(options)
    weights = dict(InitialWeights(case.config.model, case.config.training.seed))
    losses: dict[str, float] = {}
    steps: dict[str, Callable[[], Callable[[], float]]] = {
        "ours: local engine": partial(_engine, case, weights, "local"),
        "ours: megatron engine": partial(_engine, case, weights, "megatron"),
        "transformers, padded": partial(_padded, case, weights),
        "transformers, packed": partial(_packed, case, weights),
        _OTHER_MODEL: partial(_llama, case),
    }
    contenders = [
        *(Contender(name, partial(_noting_first_loss, build, name, losses)) for name, build in steps.items()),
        products(_shapes(case), case.device, case.dtype),
    ]
    try:
        timings = time_in_turns(contenders, options.rounds, case.device, case.apart)
    finally:
        leave_process_group()
    useful = training_flops(case.config.model, case.num_tokens, case.squared_lengths)
    rows = rows_of(contenders, timings, [*(useful for _ in steps), products_flops(_shapes(case))])
    for row, timing in zip(rows, timings, strict=True):
        trains = row["what"] in steps and timing.median_s
        row["tokens/s"] = case.num_tokens / timing.median_s if trains else None
        row["first loss"] = losses.get(row["what"])
    report(f"Training step, {case.title}, {_padded_batch(case)['labels'].numel():,} padded", rows, options.json)
    _require_equal({name: loss for name, loss in losses.items() if name != _OTHER_MODEL})
    return 0


def _noting_first_loss(build: Callable[[], Callable[[], float]], name: str, losses: dict[str, float]) -> Work:
    step = build()

    def work() -> None:
        loss = step()
        losses.setdefault(name, loss)

    return work


def _require_equal(losses: Mapping[str, float]) -> None:
    # None are there where no way fits into memory.
    if losses and max(losses.values()) > (1 + _LOSS_TOLERANCE) * min(losses.values()):
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        raise UserError(f"the losses of the first step differ by more than {_LOSS_TOLERANCE:.0%}: {shown}")


def _engine(case: Case, weights: Mapping[str, Tensor], name: Literal["local", "megatron"]) -> Callable[[], float]:
    config = replace(case.config, engine=replace(case.config.engine, name=name))
    engine = build_engine(config)
    engine.load_weights(weights)
    objective = LanguageModelling(Vocabulary.from_config(config.vocabulary))
    return lambda: engine.train_step([case.batch], objective, config.optimizer.learning_rate).loss


def _padded(case: Case, weights: Mapping[str, Tensor]) -> Callable[[], float]:
    model = ExportedModel(ExportedConfig(**released_config(case.config.model), use_cache=False))
    model.load_state_dict(weights)
    return _plain_step(case, model.to(case.device), _padded_batch(case))


def _packed(case: Case, weights: Mapping[str, Tensor]) -> Callable[[], float]:
    model = PlainForCausalLM(PlainConfig(dict(vars(case.config.model))))
    model.load_state_dict(weights)
    batch = case.batch
    labels = batch.targets.masked_fill(batch.loss_weights == 0, IGNORED).roll(1, dims=1)
    inputs = {"input_ids": batch.input_ids, "labels": labels, "documents": batch.documents}
    return _plain_step(case, model.to(case.device), inputs)


def _llama(case: Case) -> Callable[[], float]:
    model = case.config.model
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_groups,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.rms_norm_eps,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with case.device:
        return _plain_step(case, LlamaForCausalLM(config), _padded_batch(case))


def _plain_step(case: Case, model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], float]:
    config = case.config.optimizer
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, **adamw_options(config))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(case.device.type, case.dtype, enabled=case.dtype != torch.float32):
            loss = model(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        return loss.item()

    return step


def _padded_batch(case: Case) -> dict[str, Tensor]:
    """The case's documents, each a row: `input_ids`, `attention_mask` and `labels` [documents, longest]."""
    ids = [torch.from_numpy(document.ids).long() for document in case.documents]
    labels = pad_sequence(ids, batch_first=True, padding_value=IGNORED)
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD_ID),
        "attention_mask": (labels != IGNORED).long(),
        "labels": labels,
    }
    return {name: tensor.to(case.device) for name, tensor in batch.items()}


def _shapes(case: Case) -> list[tuple[int, int, int]]:
    """Products of one layer and the head."""
    model, tokens = case.config.model, case.num_tokens
    h, kv, inner = model.hidden_size, model.num_attention_groups * model.head_dim, model.intermediate_size
    pairs = [(h, h), (h, kv), (h, kv), (h, h), (h, inner), (h, inner), (inner, h), (h, model.vocab_size)]
    return [(tokens, k, n) for k, n in pairs]
