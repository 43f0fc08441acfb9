"""Rows that data-parallel ranks exchange: the same global batch, dealt by cost, with the same loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from stepaudio_train.config.schema import EngineConfig, PretrainConfig
from stepaudio_train.data.balance import deal_rows
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.packing import Document, pack_rows
from stepaudio_train.engines.base import StepResult
from stepaudio_train.engines.build import build_engine
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.testing.small_runs import SMALL_RUN, VOCABULARY
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.balance import BatchLoad, balanced
from stepaudio_train.training.throughput import training_flops

# As in test_deepspeed_engine.py: the first file of this folder decides what all launches find imported.
PRELOAD = ["stepaudio_train.engines.megatron.engine", "stepaudio_train.engines.deepspeed.zero", "peft"]
LENGTH = 64
ROWS = [[64], [60], [20, 20, 20], [1] * 4, [32, 32], [63], [8] * 8, []]
"""Lengths of the documents of each row: the first half costs more than the second."""
ENGINES = {
    "local": EngineConfig(device="cpu"),
    "megatron": EngineConfig(name="megatron", device="cpu"),
    "deepspeed": EngineConfig(name="deepspeed", device="cpu"),
}


def global_batch() -> TokenBatch:
    """Row r holds the id 30 + r alone."""
    rows = [
        [Document(np.full(n, 30 + r, np.int32), np.ones(n, np.float32), 0) for n in lengths]
        for r, lengths in enumerate(ROWS)
    ]
    batch = pack_rows(rows, LENGTH)
    numbers = torch.arange(len(ROWS) * LENGTH, dtype=torch.float32).view(len(ROWS), LENGTH)
    return replace(batch, extras={"number": numbers})


def config_of(name: str) -> PretrainConfig:
    training = replace(SMALL_RUN.training, sequence_length=LENGTH, global_batch_rows=len(ROWS), micro_batch_rows=1)
    return replace(SMALL_RUN, engine=ENGINES[name], training=training)


def step(name: str) -> tuple[dict[str, torch.Tensor], BatchLoad, StepResult]:
    """This rank's rows after the exchange, and what a step on them gives."""
    engine = build_engine(config_of(name))
    whole, own = global_batch(), len(ROWS) // engine.data_parallel_size
    first = engine.data_parallel_rank * own
    batch, load = balanced(whole.map(lambda tensor: tensor[first : first + own]), engine)
    torch.manual_seed(1)
    engine.load_weights(Step1ForCausalLM(engine.config.model).state_dict())
    result = engine.train_step(batch.split(1), LanguageModelling(Vocabulary.from_config(VOCABULARY)), 1e-3)
    tensors = batch.named_tensors()
    engine.close()
    return tensors, load, result


def steps() -> dict[str, tuple[dict[str, torch.Tensor], BatchLoad, StepResult]]:
    """`step` of both engines, one after the other."""
    dist.init_process_group("gloo")
    results = {name: step(name) for name in ("megatron", "deepspeed")}
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def alone():
    return step("local")


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_distributed(steps, 2, preload=PRELOAD)


@pytest.mark.parametrize("name", ["megatron", "deepspeed"])
def test_exchanged_rows_are_the_global_batch_and_train_alike(name, on_two_ranks, alone):
    ranks = [results[name] for results in on_two_ranks]
    costs = np.array([training_flops(SMALL_RUN.model, LENGTH, square) for square in _squares()])
    dealt = deal_rows(costs, 2)
    whole = global_batch().named_tensors()
    for (tensors, load, result), rows in zip(ranks, dealt, strict=True):
        assert tensors.keys() == whole.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, whole[key][rows]), key
            assert tensor.dtype == whole[key].dtype
        totals = costs[dealt].sum(1)
        assert load.cost_max_over_mean == pytest.approx(totals.max() / totals.mean())
        assert load.num_tokens == sum(map(sum, ROWS)) and load.squared_lengths == sum(_squares())
        assert load.fill == pytest.approx(load.num_tokens / (len(ROWS) * LENGTH))
        assert result.loss == pytest.approx(alone[2].loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(alone[2].grad_norm, rel=1e-4)
    assert set(dealt[0].tolist()) != set(range(len(ROWS) // 2)), "rows have to move for this to show anything"


def test_alone_the_batch_is_put_in_order(alone):
    tensors, load, _ = alone
    order = np.argsort(-np.array(_squares()), kind="stable")
    assert torch.equal(tensors["input_ids"], global_batch().input_ids[order])
    assert load.cost_max_over_mean == 1.0


def _squares() -> list[int]:
    """Of each row; padding is a document."""
    return [sum(n * n for n in lengths) + (LENGTH - sum(lengths)) ** 2 for lengths in ROWS]
