"""Megatron checkpoints: the same run goes on, bit for bit at the same layout, nearly so at another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepaudio_train.config.schema import (
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainingConfig,
    VocabularyConfig,
)
from stepaudio_train.convert.megatron_files import MegatronCheckpoint
from stepaudio_train.convert.sources import LazyWeights
from stepaudio_train.data.synthetic import SyntheticLoader
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.testing.distributed import RankFailed, run_distributed
from stepaudio_train.tokenizers.vocabulary import Vocabulary

PRELOAD = ["stepaudio_train.engines.megatron.engine"]
ROWS, LENGTH = 8, 32

# An odd vocabulary: tensor parallelism has to pad it.
VOCABULARY = VocabularyConfig(text_size=345, linguistic_size=64, semantic_size=96, reserved_size=0)
MODEL = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_attention_groups=2,
    vocab_size=505,
)
CONFIG = PretrainConfig(
    model=MODEL,
    vocabulary=VOCABULARY,
    optimizer=OptimizerConfig(learning_rate=3e-3, embedding_learning_rate_multiplier=5.0),
    training=TrainingConfig(sequence_length=LENGTH, global_batch_rows=ROWS),
)
LAYOUTS = {
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "pp2 vp2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "dp2": {},
    "cp2": {"context_parallel": 2},
    "tp2 bf16": {"tensor_parallel": 2, "precision": "bf16"},
    "dp2 plain": {"distributed_optimizer": False},
    "tp2 plain": {"tensor_parallel": 2, "distributed_optimizer": False},
    "pp2 plain": {"pipeline_parallel": 2, "distributed_optimizer": False},
}
SAVED = ("tp2", "pp2 vp2", "dp2", "cp2", "tp2 bf16", "tp2 plain")
RESUMED = {
    "tp2": ("tp2", "pp2", "dp2", "cp2"),
    "cp2": ("cp2", "pp2"),
    "pp2 vp2": ("pp2 vp2", "tp2"),
    "dp2": ("dp2",),
    "tp2 bf16": ("tp2 bf16",),
    "tp2 plain": ("tp2 plain", "pp2 plain"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(folder) -> dict:
    """Losses of each saved run after its checkpoint, and of what was resumed from it."""
    return run_distributed(_save_and_resume, 2, folder, preload=PRELOAD)[0]


@pytest.mark.parametrize("saved", SAVED)
def test_same_layout_goes_on_bit_for_bit(runs, saved):
    assert runs[saved, saved] == runs[saved]


@pytest.mark.parametrize("saved, resumed", [(s, r) for s in SAVED for r in RESUMED[s] if r != s])
def test_another_layout_goes_on_nearly_the_same(runs, saved, resumed):
    assert runs[saved, resumed] == pytest.approx(runs[saved], rel=1e-4)


def test_one_process_reads_what_two_wrote(runs, folder):
    one = run_distributed(_resume, 1, "dp2", folder / "tp2", preload=PRELOAD)[0]
    assert one == pytest.approx(runs["tp2"], rel=1e-4)


def test_padding_is_not_in_a_checkpoint(runs, folder):
    shapes = run_distributed(_stored_shapes, 1, folder / "tp2", preload=PRELOAD)[0]
    padded_too = [key for key in shapes if "word_embeddings" in key or "output_layer" in key]
    # The weights, the optimizer's copy of them and its two moments, for embedding and head.
    assert len(padded_too) == 8
    assert {shapes[key] for key in padded_too} == {(505, 16)}


def test_background_save_holds_the_moment_it_was_asked_for(tmp_path):
    for rank, (expected, got, finished) in enumerate(run_distributed(_background, 2, tmp_path, preload=PRELOAD)):
        assert finished == [True, True], rank
        if rank == 0:
            assert list(got) == list(expected)
            for name, tensor in expected.items():
                assert torch.equal(got[name], tensor), name


def test_another_form_of_optimizer_is_refused(runs, folder):
    with pytest.raises(RankFailed, match=r"type engine\.distributed_optimizer=true"):
        run_distributed(_resume, 1, "dp2 plain", folder / "tp2", preload=PRELOAD)


def test_the_weights_alone_are_read_without_the_engine(runs, folder):
    """A vocabulary that tensor parallelism had padded, as a run in another layout begins with it."""
    read = LazyWeights(MegatronCheckpoint(folder / "tp2", MODEL), MODEL)
    expected = run_distributed(_loaded_weights, 2, folder / "tp2", preload=PRELOAD)[0]
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


def _save_and_resume(folder: Path) -> dict:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    results = {}
    for saved in SAVED:
        engine, loader = _build(saved)
        _train(engine, loader, 2)
        if engine.is_main:
            (folder / saved).mkdir()
        engine.barrier()
        engine.save(folder / saved)
        results[saved] = _train(engine, loader, 2)
        engine.close()
        for resumed in RESUMED[saved]:
            results[saved, resumed] = _resume(resumed, folder / saved)
    dist.destroy_process_group()
    return results


def _resume(layout: str, directory: Path) -> list[float]:
    engine, loader = _build(layout, seed=1)
    for _ in range(2):
        loader.next_batch()
    engine.load(directory)
    losses = _train(engine, loader, 2)
    engine.close()
    return losses


def _stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    from megatron.core import dist_checkpointing

    return {k: tuple(v.global_shape) for k, v in dist_checkpointing.load_tensors_metadata(str(directory)).items()}


def _background(folder: Path):
    engine, loader = _build("pp2")
    # Twice: the first is a checkpoint of an optimizer that has made no step.
    finished = []
    for step in range(2):
        directory = folder / str(step)
        if engine.is_main:
            directory.mkdir()
        engine.barrier()
        expected = dict(engine.export_weights())
        engine.save(directory, background=True)
        _train(engine, loader, 2)
        finished.append(engine.finish_saving(wait=True))
    engine.load(directory)
    got = dict(engine.export_weights())
    engine.close()
    return expected, got, finished


def _loaded_weights(directory: Path) -> dict[str, torch.Tensor]:
    engine, _ = _build("pp2", seed=1)
    engine.load(directory)
    weights = dict(engine.export_weights())
    engine.close()
    return weights


def _build(layout: str, seed: int = 0):
    from stepaudio_train.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(replace(CONFIG, engine=EngineConfig(name="megatron", device="cpu", **LAYOUTS[layout])))
    engine.load_weights(InitialWeights(MODEL, seed))
    loader = SyntheticLoader(
        CONFIG.data,
        Vocabulary.from_config(VOCABULARY),
        LENGTH,
        ROWS,
        seed=0,
        data_parallel_rank=engine.data_parallel_rank,
        data_parallel_size=engine.data_parallel_size,
    )
    return engine, loader


def _train(engine, loader, steps: int) -> list[float]:
    objective = LanguageModelling(Vocabulary.from_config(VOCABULARY))
    return [engine.train_step(loader.next_batch().split(2), objective, 3e-3).loss for _ in range(steps)]
