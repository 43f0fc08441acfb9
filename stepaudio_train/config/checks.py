"""Rules that span several fields of a training run's configuration. All broken ones are told at once."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import get_args

from stepaudio_train.config.policy_runs import PolicyRunConfig
from stepaudio_train.config.preference_runs import DpoRunConfig, PreferenceRunConfig, RewardConfig
from stepaudio_train.config.preferences import preference_data_problems
from stepaudio_train.config.rlhf import dpo_problems, reward_loss_problems
from stepaudio_train.config.schema import DataConfig, EngineConfig, PretrainConfig, RunConfig, Task
from stepaudio_train.config.sft import ChatTask, SftConfig, with_text_tokenizer

_PARTS = ("tensor_parallel", "context_parallel", "pipeline_parallel", "virtual_pipeline")
"""Fields of the engine that cut the model or its rows."""


def pretrain_problems(config: PretrainConfig) -> list[str]:
    """One line for each rule that `config` breaks in the world it is started in ($WORLD_SIZE processes)."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    problems = layout_problems(config, world_size)
    problems += _data_problems("data", config.data, config)
    if config.validation is not None:
        problems += _data_problems("validation", config.validation, config)
    return problems + training_problems(config) + _early_stop_problems(config)


def sft_problems(config: SftConfig) -> list[str]:
    """One line for each rule that `config` breaks in the world it is started in ($WORLD_SIZE processes)."""
    problems = layout_problems(config, int(os.environ.get("WORLD_SIZE", "1")))
    data = config.data
    if not data.path:
        problems.append("data: required; type data=FILE.jsonl, a conversation a line (docs/fine_tuning.md)")
    elif not Path(data.path).is_file():
        problems.append(f"data={data.path}: no such file; type data=FILE.jsonl, a conversation a line")
    if config.validation is not None and not Path(config.validation).is_file():
        problems.append(f"validation={config.validation}: no such file")
    if data.speech_tokenizer is not None and not Path(data.speech_tokenizer).is_dir():
        problems.append(f"data.speech_tokenizer={data.speech_tokenizer}: no such folder")
    if not 0 < data.epochs < math.inf:
        problems.append(f"data.epochs={data.epochs}: must be over 0")
    for task, weight in data.task_weights.items():
        if not 0 < weight < math.inf:
            problems.append(
                f"data.task_weights.{task}={weight}: must be over 0; leave conversations out of the file instead"
            )
    problems += init_problems(config)
    if config.training.sample_every < 0 or config.training.num_samples < 1:
        problems.append(
            f"training.sample_every={config.training.sample_every}, num_samples={config.training.num_samples}: must be "
            "at least 0 and 1; type training.sample_every=0 for no samples"
        )
    return problems + training_problems(config) + _early_stop_problems(config)


def reward_run_problems(config: RewardConfig) -> list[str]:
    """One line for each rule that `config` breaks in the world it is started in ($WORLD_SIZE processes)."""
    problems = reward_loss_problems(config.loss, "loss")
    if not config.model.value_head:
        problems.append("model.value_head=false: a reward is what the value head says; type model.value_head=true")
    return problems + _preference_problems(config)


def dpo_run_problems(config: DpoRunConfig) -> list[str]:
    """One line for each rule that `config` breaks in the world it is started in ($WORLD_SIZE processes)."""
    problems = dpo_problems(config.loss, "loss")
    if config.model.value_head:
        problems.append("model.value_head=true: DPO trains no value head; type model.value_head=false")
    return problems + _preference_problems(config)


def _preference_problems(config: PreferenceRunConfig) -> list[str]:
    problems = layout_problems(config, int(os.environ.get("WORLD_SIZE", "1")))
    problems += preference_data_problems(config.data) + init_problems(config)
    return problems + training_problems(config) + _early_stop_problems(config)


def init_problems(config: RunConfig) -> list[str]:
    """Weights to go on from, and a text tokenizer with them or beside them."""
    if config.model.init is None:
        return ["model.init: fine-tuning goes on from trained weights; type model.init=DIR"]
    return _text_tokenizer_problems(with_text_tokenizer(config)) if Path(config.model.init).is_dir() else []


def layout_problems(config: RunConfig, world_size: int) -> list[str]:
    """The rules of model, engine and batch alone, over `world_size` processes: no file is looked at."""
    problems = _model_problems(config) + _engine_problems(config, world_size) + _batch_problems(config, world_size)
    return problems + (_stream_problems(config, world_size) if isinstance(config, PretrainConfig) else [])


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Model replicas; at least 1, whatever the layout asks for."""
    return max(1, world_size // replica_ranks(config.engine))


def replica_ranks(engine: EngineConfig) -> int:
    """Ranks over which a model replica is cut; at least 1, whatever the layout asks for."""
    return max(1, engine.tensor_parallel * engine.context_parallel * engine.pipeline_parallel)


def _model_problems(config: RunConfig) -> list[str]:
    model, total = config.model, config.vocabulary.total_size
    problems = []
    if model.vocab_size != total:
        problems.append(
            f"model.vocab_size={model.vocab_size}: the vocabulary's ranges add up to {total}; type "
            f"model.vocab_size={total}, or another vocabulary= group"
        )
    if model.hidden_size % model.num_attention_heads:
        problems.append(
            f"model.num_attention_heads={model.num_attention_heads}: must divide model.hidden_size={model.hidden_size}"
        )
    if model.num_attention_heads % model.num_attention_groups:
        problems.append(
            f"model.num_attention_groups={model.num_attention_groups}: must divide "
            f"model.num_attention_heads={model.num_attention_heads}"
        )
    if config.vocabulary.text_size < 324:
        problems.append(
            f"vocabulary.text_size={config.vocabulary.text_size}: special pieces and bytes alone take 324 ids"
        )
    return problems


def _engine_problems(config: RunConfig, world_size: int) -> list[str]:
    problems = _field_problems(config.engine)
    if config.lora is not None:
        problems += _lora_problems(config)
    return problems + (_layout_of_model_problems(config, world_size) if not problems else [])


def _field_problems(engine: EngineConfig) -> list[str]:
    """Fields that do not go with the engine's name."""
    problems = []
    if engine.name != "deepspeed" and engine.offload != "none":
        problems.append(f"engine.offload={engine.offload}: is DeepSpeed's; type engine=deepspeed, or remove it")
    if engine.name == "deepspeed" and engine.offload == "all" and engine.zero_stage != 3:
        problems.append(
            f"engine.offload=all: needs engine.zero_stage=3, got {engine.zero_stage}; type engine.offload=optimizer"
        )
    return problems


def _lora_problems(config: RunConfig) -> list[str]:
    lora, problems = config.lora, []
    assert lora is not None
    if config.engine.name == "megatron":
        problems.append("lora: adapters need the Hugging Face model; type engine=local or engine=deepspeed")
    if lora.rank < 1:
        problems.append(f"lora.rank={lora.rank}: must be at least 1")
    known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    if not lora.targets or set(lora.targets) - set(known):
        problems.append(f"lora.targets={list(lora.targets)}: must be some of {', '.join(known)}")
    if config.model.init is None:
        problems.append("lora: adapts weights that are there; type model.init=DIR")
    return problems


def _layout_of_model_problems(config: RunConfig, world_size: int) -> list[str]:
    engine, model = config.engine, config.model
    tp, pp, vp = engine.tensor_parallel, engine.pipeline_parallel, engine.virtual_pipeline
    parts = {name: getattr(engine, name) for name in _PARTS}
    problems = [f"engine.{name}={value}: must be at least 1" for name, value in parts.items() if value < 1]
    if problems:
        return problems
    is_cut = max(parts.values()) > 1
    named = ", ".join(f"{name}={value}" for name, value in parts.items())
    if engine.name == "local":
        if is_cut or world_size > 1:
            problems.append(
                f"engine.name=local: is one process, got {named} and {world_size} process(es); type engine=megatron"
            )
        if engine.extra:
            problems.append("engine.extra: the local engine takes none; type engine=megatron, or remove it")
        return problems
    if engine.name == "deepspeed":
        if is_cut:
            problems.append(
                f"engine.name=deepspeed: cuts the model over data-parallel ranks (engine.zero_stage), got {named}; "
                "type engine=megatron"
            )
        return problems
    ranks = replica_ranks(engine)
    if world_size % ranks:
        cut = " x ".join(f"engine.{name}={value}" for name, value in parts.items() if name != "virtual_pipeline")
        problems.append(
            f"{cut} = {ranks}: must divide the number of processes, {world_size}; type --nproc {ranks}, or a multiple "
            "of it"
        )
    for name, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_attention_groups", model.num_attention_groups),
        ("intermediate_size", model.intermediate_size),
    ):
        if value % tp:
            problems.append(f"engine.tensor_parallel={tp}: must divide model.{name}={value}")
    if model.num_hidden_layers % (pp * vp):
        problems.append(
            f"engine.pipeline_parallel={pp} x engine.virtual_pipeline={vp} = {pp * vp}: must divide "
            f"model.num_hidden_layers={model.num_hidden_layers}"
        )
    if vp > 1 and pp == 1:
        problems.append(f"engine.virtual_pipeline={vp}: needs engine.pipeline_parallel of at least 2")
    return problems


def _batch_problems(config: RunConfig, world_size: int) -> list[str]:
    engine, training = config.engine, config.training
    if min(getattr(engine, name) for name in _PARTS) < 1:
        return []
    problems = []
    dp = data_parallel_size(config, world_size)
    rows, micro = training.global_batch_rows, training.micro_batch_rows
    if rows % (dp * micro):
        fitting = -(-rows // (dp * micro)) * dp * micro
        problems.append(
            f"training.global_batch_rows={rows}: must be a multiple of data-parallel size {dp} x "
            f"training.micro_batch_rows={micro}; type training.global_batch_rows={fitting}"
        )
    elif engine.virtual_pipeline > 1 and (rows // dp // micro) % engine.pipeline_parallel:
        problems.append(
            f"training.micro_batch_rows={micro}: gives {rows // dp // micro} micro-batches a step, and the interleaved "
            f"schedule needs a multiple of engine.pipeline_parallel={engine.pipeline_parallel}"
        )
    tp, cp, length = engine.tensor_parallel, engine.context_parallel, training.sequence_length
    if cp > 1 and length % (2 * cp * tp):
        problems.append(
            f"training.sequence_length={length}: context and sequence parallelism cut it into 2 x "
            f"engine.context_parallel={cp} x engine.tensor_parallel={tp} equal parts; type "
            f"training.sequence_length={-(-length // (2 * cp * tp)) * 2 * cp * tp}"
        )
    elif length % tp:
        problems.append(
            f"training.sequence_length={length}: sequence parallelism cuts it into engine.tensor_parallel={tp} equal "
            "parts"
        )
    return problems


def _stream_problems(config: PretrainConfig, world_size: int) -> list[str]:
    if min(getattr(config.engine, name) for name in _PARTS) < 1:
        return []
    problems = []
    dp = data_parallel_size(config, world_size)
    streams, rows = config.data.num_streams, config.training.global_batch_rows
    if streams % dp:
        problems.append(
            f"data.num_streams={streams}: must be a multiple of the data-parallel size, {dp}; type "
            f"data.num_streams={-(-streams // dp) * dp}"
        )
    if rows % streams:
        problems.append(
            f"training.global_batch_rows={rows}: must be a multiple of data.num_streams={streams}; type "
            f"training.global_batch_rows={-(-rows // streams) * streams}"
        )
    return problems


def _data_problems(key: str, data: DataConfig, config: PretrainConfig) -> list[str]:
    if data.source == "synthetic":
        return []
    problems = []
    if not any(entry.weight > 0 for entry in data.blend.values()):
        problems.append(f"{key}.blend: no entry with a weight over 0")
    for name, entry in data.blend.items():
        if entry.weight < 0:
            problems.append(f"{key}.blend.{name}.weight={entry.weight}: must not be negative")
        elif entry.weight == 0:
            continue
        elif entry.task == "image":
            problems.append(
                f"{key}.blend.{name}: image data cannot be read yet; type {key}.blend.{name}.weight=0 to train "
                "without it"
            )
        elif not Path(entry.path).is_dir():
            problems.append(
                f"{key}.blend.{name}.path={entry.path}: no such folder; `stepaudio tokenize` writes them, or type "
                f"{key}.blend.{name}.weight=0"
            )
    return problems + _text_tokenizer_problems(config)


def _text_tokenizer_problems(config: RunConfig) -> list[str]:
    tokenizer = config.vocabulary.text_tokenizer
    if tokenizer is None:
        return ["vocabulary.text_tokenizer: needed to encode text; type vocabulary.text_tokenizer=FILE.model"]
    return [] if Path(tokenizer).is_file() else [f"vocabulary.text_tokenizer={tokenizer}: no such file"]


def training_problems(config: RunConfig) -> list[str]:
    """Sizes and lengths, and whether the first weights are there."""
    training = config.training
    # Fine-tuning counts its steps from its epochs where none are given.
    least = dict.fromkeys(("sequence_length", "global_batch_rows", "micro_batch_rows", "keep_checkpoints"), 1)
    least["max_steps"] = 0 if isinstance(config, (SftConfig, PreferenceRunConfig, PolicyRunConfig)) else 1
    if isinstance(config, PolicyRunConfig):
        del least["global_batch_rows"]
    problems = [
        f"training.{name}={getattr(training, name)}: must be at least {number}"
        for name, number in least.items()
        if getattr(training, name) < number
    ]
    if config.model.init is not None and not Path(config.model.init).is_dir():
        problems.append(f"model.init={config.model.init}: no such folder")
    return problems


def _early_stop_problems(config: PretrainConfig | SftConfig | PreferenceRunConfig) -> list[str]:
    early_stop, problems = config.training.early_stop, []
    if early_stop is None:
        return []
    on_preferences = isinstance(config, PreferenceRunConfig)
    if (config.data.held_out if on_preferences else config.validation) is None:
        given = "validation=FILE.jsonl" if isinstance(config, SftConfig) else "validation.blend, as in data.blend"
        given = "data.held_out=FILE.jsonl" if on_preferences else given
        problems.append(f"training.early_stop: needs held-out data; type {given}")
    if config.training.eval_every < 1:
        problems.append("training.early_stop: needs evaluations on the way; type training.eval_every=STEPS")
    if early_stop.patience < 1:
        problems.append(f"training.early_stop.patience={early_stop.patience}: must be at least 1")
    if not 0 <= early_stop.min_delta < math.inf:
        problems.append(f"training.early_stop.min_delta={early_stop.min_delta}: must be 0 or more")
    known = [f"val/loss/task/{task}" for task in dict.fromkeys((*get_args(Task), *get_args(ChatTask)))]
    known = ["val/loss", "val/loss/text", "val/loss/linguistic", "val/loss/semantic", *known]
    known = known[:1] if on_preferences else known
    if early_stop.metric not in known:
        problems.append(f"training.early_stop.metric={early_stop.metric}: must be one of {', '.join(known)}")
    return problems
