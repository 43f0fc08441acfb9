"""A model that only judges says what an engine says, bit for bit, with the memory of its weights alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stepaudio_train.config.schema import EngineConfig, RunConfig
from stepaudio_train.data.synthetic import SyntheticLoader
from stepaudio_train.engines.build import build_engine, build_judge
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.testing.small_runs import SMALL_RUN
from stepaudio_train.tokenizers.vocabulary import Vocabulary

# As in test_deepspeed_engine.py: the first file of this folder decides what all launches find imported.
PRELOAD = ["stepaudio_train.engines.megatron.engine", "stepaudio_train.engines.deepspeed.zero", "peft"]
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# Name -> (fields, bytes of a weight, ranks that weights are cut over).
ENGINES = {
    "tp2": ({"name": "megatron", "tensor_parallel": 2}, 4, 2),
    "pp2": ({"name": "megatron", "pipeline_parallel": 2, "precision": "bf16"}, 2, 2),
    "dp2": ({"name": "megatron"}, 4, 1),
    "cp2": ({"name": "megatron", "context_parallel": 2}, 4, 1),
    "zero1": ({"name": "deepspeed", "zero_stage": 1}, 4, 1),
    "zero2 in bf16": ({"name": "deepspeed", "zero_stage": 2, "precision": "bf16"}, 2, 1),
    "zero3": ({"name": "deepspeed", "zero_stage": 3, "extra": CUT_ALL}, 4, 2),
    "zero3 in bf16, offloaded": (
        {"name": "deepspeed", "zero_stage": 3, "extra": CUT_ALL, "precision": "bf16", "offload": "all"}, 2, 2
    ),
}  # fmt: skip
MODEL = replace(SMALL_RUN.model, value_head=True)


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor], int, int]]:
    """Name -> outputs of the engine and of the judge, and the bytes that each holds afterwards, of rank 0; the engine
    after a step."""
    return run_distributed(_ask_all, 2, preload=PRELOAD)[0]


@pytest.mark.parametrize("name", ENGINES)
def test_a_judge_says_what_the_engine_says_with_less_memory(found, name):
    by_engine, by_judge, engine_bytes, judge_bytes = found[name]
    assert all(map(torch.equal, by_engine, by_judge)) and by_judge[0].any() and by_judge[1].any()
    _, size, ranks = ENGINES[name]
    num_parameters = sum(value.numel() for value in dict(InitialWeights(MODEL, seed=3)).values())
    # Batches and what was found in them are no small part of a toy.
    assert judge_bytes < 1.3 * size * num_parameters / ranks
    assert engine_bytes > 2 * judge_bytes


def _ask_all() -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor], int, int]]:
    dist.init_process_group("gloo")
    found = {}
    for name, (fields, _, _) in ENGINES.items():
        config = replace(SMALL_RUN, model=MODEL, engine=EngineConfig(device="cpu", **fields))
        engine, judge = _asked(config, build_engine), _asked(config, build_judge)
        found[name] = (engine[0], judge[0], engine[1], judge[1])
    dist.destroy_process_group()
    return found


def _asked(config: RunConfig, build: Callable[[RunConfig], Any]) -> tuple[list[torch.Tensor], int]:
    before = _held_bytes()
    model = build(config)
    weights = InitialWeights(config.model, seed=3)
    head = torch.linspace(-1, 1, config.model.hidden_size)[None]
    model.load_weights({**dict(weights), "value_head.weight": head})
    vocabulary = Vocabulary.from_config(config.vocabulary)
    batches = SyntheticLoader(SMALL_RUN.data, vocabulary, 64, 4, 0).next_batch().split(2)
    outputs = model.outputs(batches, entropies=True)
    found = [torch.stack([getattr(one, name) for one in outputs]) for name in ("log_probs", "values", "entropies")]
    del outputs
    if build is build_engine:
        model.train_step(batches, LanguageModelling(vocabulary), 1e-3)
    held = _held_bytes() - before
    model.close()
    return found, held


def _held_bytes() -> int:
    """Of all tensors there are, each memory once."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())
