"""The policy's weights reach the rollout model bit by bit from every engine and layout, and each replica gets its own
answers on all its ranks.

A launch an engine; every layout trains a step first, so that there is something to hand over.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from stepaudio_train.config.rollout import RolloutConfig
from stepaudio_train.config.schema import (
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainingConfig,
    VocabularyConfig,
)
from stepaudio_train.data.synthetic import SyntheticLoader
from stepaudio_train.engines.base import Engine
from stepaudio_train.engines.build import build_engine
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import VALUE_HEAD
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.rollout.generate import generate
from stepaudio_train.rollout.rollouts import Rollout, RolloutModel
from stepaudio_train.rollout.sampling import ANSWER_ENDS, SamplingConfig
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.tokenizers.vocabulary import Vocabulary

# The first file of this folder decides what all launches find imported.
PRELOAD = ["stepaudio_train.engines.megatron.engine", "stepaudio_train.engines.deepspeed.zero", "peft"]

# An odd vocabulary: tensor parallelism has to pad it.
VOCABULARY = VocabularyConfig(text_size=345, linguistic_size=64, semantic_size=96, reserved_size=0)
MODEL = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_attention_groups=2,
    vocab_size=505,
    init_std=0.3,
)
CONFIG = PretrainConfig(
    model=MODEL,
    vocabulary=VOCABULARY,
    optimizer=OptimizerConfig(learning_rate=1e-2, embedding_learning_rate_multiplier=5.0),
    training=TrainingConfig(sequence_length=32, global_batch_rows=8),
)
WITH_VALUES = replace(CONFIG, model=replace(MODEL, value_head=True))
ADAPTED = replace(CONFIG, lora=LoraConfig(rank=4, alpha=12.0, targets=("q_proj", "v_proj", "down_proj")))
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SAMPLING = RolloutConfig(max_new_tokens=8, top_p=0.95)
PROMPTS = [[1, 5, 9], [1, 7, 7, 30, 12, 3, 41], [1], [1, 40, 2, 2, 8]]

# name -> (configuration, engine fields)
LAYOUTS = {
    "megatron": {
        "tp2 pp2": (CONFIG, {"tensor_parallel": 2, "pipeline_parallel": 2}),
        "tp2 dp2, bf16": (WITH_VALUES, {"tensor_parallel": 2, "precision": "bf16"}),
        "pp2 vp2 dp2": (CONFIG, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
        "cp2 pp2": (CONFIG, {"context_parallel": 2, "pipeline_parallel": 2}),
    },
    "deepspeed": {
        "stage 2": (CONFIG, {"zero_stage": 2}),
        "stage 3": (WITH_VALUES, {"zero_stage": 3, "extra": CUT_ALL}),
        "stage 3, bf16": (CONFIG, {"zero_stage": 3, "extra": CUT_ALL, "precision": "bf16"}),
        "stage 3, adapters": (ADAPTED, {"zero_stage": 3, "extra": CUT_ALL}),
        # In this launch since it has imported what adapters need; each rank is an engine of its own.
        "local, adapters": (ADAPTED, {"name": "local"}),
    },
}


@pytest.mark.parametrize("engine, world_size", [("megatron", 4), ("deepspeed", 2)])
def test_every_replica_generates_with_the_engines_own_weights(engine, world_size):
    results = run_distributed(_run_layouts, world_size, engine, preload=PRELOAD)
    for name in LAYOUTS[engine]:
        exported = results[0][name]["exported"]
        answers: dict[int, list[list[Rollout]]] = {}
        for rank, result in enumerate(results):
            told = f"{name}, rank {rank}"
            got = result[name]
            for weight, tensor in got["handed over"].items():
                assert torch.equal(tensor, exported[weight].to(tensor.dtype)), f"{told}: {weight}"
            assert got["handed over"].keys() == (exported.keys() - set(VALUE_HEAD) if got["is main"] else set()), told
            if got["is main"]:
                assert got["report"].peak_extra_bytes > got["report"].num_bytes > 0, told
            # Told by the replica's main rank, the only one that generates.
            assert got["refused"] == "prompt 1 is empty: there is nothing to go on from", told
            answers.setdefault(got["replica"], []).append(got["answers"])
        _check_answers(name, answers, exported, LAYOUTS[engine][name][1].get("precision") == "bf16")


def _check_answers(name: str, answers: dict, exported: dict, bf16: bool) -> None:
    for replica, told in answers.items():
        assert all(each == told[0] for each in told), f"{name}: the ranks of replica {replica} were told other answers"
        assert [list(rollout.prompt) for rollout in told[0]] == _prompts(replica)
        assert all(rollout.ended == (rollout.ids[-1] in ANSWER_ENDS) for rollout in told[0])
    if len(answers) > 1:
        assert answers[0][0] != answers[1][0]
    dtype = torch.bfloat16 if bf16 else torch.float32
    weights = {weight: tensor.to(dtype) for weight, tensor in exported.items() if weight not in VALUE_HEAD}
    sampling = SamplingConfig(max_new_tokens=8, temperature=1.0, top_p=0.95, stop_ids=ANSWER_ENDS)
    found = generate(Step1ForCausalLM.of_weights(MODEL, weights), _prompts(0), sampling, _seeds(0))
    expected = [generation.ids for generation in found]
    assert [[i for i in rollout.ids if i not in ANSWER_ENDS] for rollout in answers[0][0]] == expected, name


def _run_layouts(engine: str) -> dict[str, dict]:
    dist.init_process_group("gloo")
    results = {}
    for name, (config, fields) in LAYOUTS[engine].items():
        built = build_engine(replace(config, engine=EngineConfig(**{"name": engine, "device": "cpu", **fields})))
        results[name] = _run(built)
        built.close()
    dist.destroy_process_group()
    return results


def _run(engine: Engine) -> dict:
    engine.load_weights(InitialWeights(engine.config.model, 0))
    rollouts = RolloutModel(engine, SAMPLING)
    rollouts.refresh(engine)
    _train(engine)
    report = rollouts.refresh(engine)
    replica = engine.data_parallel_rank
    weights = rollouts.weights()
    return {
        "replica": replica,
        "is main": engine.is_replica_main,
        "report": report,
        "handed over": {name: weight.clone() for name, weight in weights.items()},
        "answers": rollouts.answer(_prompts(replica), _seeds(replica)),
        "refused": _message_of_an_empty_prompt(rollouts),
        "exported": dict(engine.export_weights()),
    }


def _train(engine: Engine) -> None:
    training, vocabulary = engine.config.training, Vocabulary.from_config(VOCABULARY)
    replica, replicas = engine.data_parallel_rank, engine.data_parallel_size
    length, rows = training.sequence_length, training.global_batch_rows
    batch = SyntheticLoader(DataConfig(), vocabulary, length, rows, 1, replica, replicas).next_batch()
    engine.train_step(batch.split(1), LanguageModelling(vocabulary), 1e-2)


def _message_of_an_empty_prompt(rollouts: RolloutModel) -> str:
    try:
        rollouts.answer([[1], []], [0, 1])
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _prompts(replica: int) -> list[list[int]]:
    return [[*prompt, 50 + replica] for prompt in PROMPTS]


def _seeds(replica: int) -> list[int]:
    return [10 * replica + index for index in range(len(PROMPTS))]
