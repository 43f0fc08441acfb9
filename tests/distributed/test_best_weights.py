"""A run that ends with its best weights, and the samples that it draws, on two ranks of either engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stepaudio_train.config.schema import (
    EarlyStopConfig,
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    PretrainConfig,
    TrainingConfig,
    VocabularyConfig,
)
from stepaudio_train.convert.sources import LazyWeights, open_source
from stepaudio_train.data.loader import build_train_loader
from stepaudio_train.data.packing import Document
from stepaudio_train.engines.build import build_engine
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.rollout.samples import SampleWriter, first_exchanges
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.testing.token_data import write_text_tokenizer
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.loop import fit
from stepaudio_train.training.run_directory import RunDirectory

# As in test_deepspeed_engine.py: the first file of this folder decides what all launches find imported.
PRELOAD = ["stepaudio_train.engines.megatron.engine", "stepaudio_train.engines.deepspeed.zero", "peft"]
VOCABULARY = VocabularyConfig(text_size=401, linguistic_size=64, semantic_size=96, reserved_size=0)
CONFIG = PretrainConfig(
    model=ModelConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_attention_groups=2,
        vocab_size=VOCABULARY.total_size,
    ),
    vocabulary=VOCABULARY,
    training=TrainingConfig(
        max_steps=9, sequence_length=32, global_batch_rows=4, micro_batch_rows=1, eval_every=1, keep_checkpoints=1,
        early_stop=EarlyStopConfig(patience=2),
    ),
    logging=LoggingConfig(tensorboard=False, wandb="disabled", progress_bar=False),
)  # fmt: skip
HELD_OUT = (4.0, 3.0, 3.5, 3.1)
"""Made-up held-out losses, one a step: step 2 is best, step 4 is the last."""
ENGINES = {
    "local": {"name": "local"},
    "tp2": {"name": "megatron", "tensor_parallel": 2},
    "pp2": {"name": "megatron", "pipeline_parallel": 2},
    "dp2": {"name": "megatron"},
    "zero 2": {"name": "deepspeed", "zero_stage": 2},
    "zero 3": {"name": "deepspeed", "zero_stage": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run directory for each of ENGINES."""
    folder = tmp_path_factory.mktemp("runs")
    write_text_tokenizer(folder / "text.model")
    _run("local", folder)
    run_distributed(_run_on_two_ranks, 2, folder, preload=PRELOAD)
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_the_best_weights_are_kept_and_exported(folder, name):
    run = folder / name
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    best = dict(LazyWeights(open_source(run / "checkpoints" / "step_00000002").reader, CONFIG.model))
    last = dict(LazyWeights(open_source(run / "checkpoints" / "step_00000004").reader, CONFIG.model))
    exported = load_file(run / "export" / "model-00001.safetensors")
    assert exported.keys() == best.keys()
    assert all(torch.equal(tensor, best[key]) for key, tensor in exported.items())
    assert not torch.equal(last["lm_head.weight"], best["lm_head.weight"])


@pytest.mark.parametrize("name", ENGINES)
def test_samples_do_not_depend_on_the_engine(folder, name):
    samples = {path.name: path.read_text() for path in (folder / name / "samples").iterdir()}
    assert sorted(samples) == ["step_00000002.jsonl", "step_00000003.jsonl"]
    assert samples == {path.name: path.read_text() for path in (folder / "local" / "samples").iterdir()}
    lines = [json.loads(line) for line in samples["step_00000002.jsonl"].splitlines()]
    assert [line["id"] for line in lines] == [0, 1] and all(line["answer"] for line in lines)


def _run_on_two_ranks(folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name in ENGINES:
        if name != "local":
            _run(name, folder)
    dist.destroy_process_group()


def _run(name: str, folder: Path) -> None:
    config = replace(CONFIG, run_dir=str(folder / name), engine=EngineConfig(device="cpu", **ENGINES[name]))
    engine = build_engine(config)
    run = RunDirectory(config.run_dir)
    if engine.is_main:
        run.claim(config)
    engine.barrier()
    losses = iter(HELD_OUT)
    engine.evaluate = lambda micro_batches, objective: {"loss": (next(losses), 1.0)}  # type: ignore[method-assign]
    vocabulary, training = Vocabulary.from_config(VOCABULARY), config.training
    replica = (engine.data_parallel_rank, engine.data_parallel_size)
    rows = (training.sequence_length, training.global_batch_rows)
    loader = build_train_loader(config.data, vocabulary, *rows, training.seed, *replica)
    sampler = SampleWriter(
        first_exchanges(_documents(vocabulary), 2),
        3,
        run.path / "samples",
        TextTokenizer.from_file(folder / "text.model"),
        vocabulary,
    )
    try:
        fit(config, engine, loader, LanguageModelling(vocabulary), run, [loader.next_batch()], sampler)
    finally:
        engine.close()
        run.release()


def _documents(vocabulary: Vocabulary) -> list[Document]:
    """A written answer and a spoken one."""
    weights = np.array([0, 0, 0, 1, 1], np.float32)
    ids = np.array([[1, 70, 80, 90, 3], [1, 70, 80, vocabulary.linguistic_offset, 3]], np.int32)
    return [Document(row, weights, 0) for row in ids]
