"""What `stepaudio convert` writes is read by Megatron-Core and DeepSpeed themselves, and the other way round."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from stepaudio_train.config.schema import EngineConfig, ModelConfig, PretrainConfig, VocabularyConfig
from stepaudio_train.convert.deepspeed_files import DeepSpeedCheckpoint, UniversalWriter, ZeroThreeWriter, find_tag
from stepaudio_train.convert.megatron_files import Layout, MegatronCheckpoint, MegatronWriter
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import entries
from stepaudio_train.testing.distributed import run_distributed

VOCABULARY = VocabularyConfig(text_size=344, linguistic_size=64, semantic_size=96, reserved_size=0)
MODEL = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_attention_groups=2,
    vocab_size=504,
)  # fmt: skip
WEIGHTS = InitialWeights(MODEL, seed=3)


def config(**engine: object) -> PretrainConfig:
    return PretrainConfig(model=MODEL, vocabulary=VOCABULARY, engine=EngineConfig(device="cpu", **engine))


def write(writer) -> None:
    for entry in entries(MODEL).values():
        writer.write(entry, {name: WEIGHTS[name] for name in entry.hf})
    writer.finish()


def assert_initial(read: dict[str, torch.Tensor]) -> None:
    assert read.keys() == WEIGHTS.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, WEIGHTS[name]), name


def test_megatron_reads_what_was_converted(tmp_path):
    layouts = {str(index): layout for index, layout in enumerate((Layout(), Layout(2, 2, 1), Layout(2, 2, 2)))}
    for name, layout in layouts.items():
        write(MegatronWriter(tmp_path / name, MODEL, layout))
    results = run_distributed(
        _load_with_megatron, 4, tmp_path, list(layouts), preload=["stepaudio_train.engines.megatron.engine"]
    )
    for weights in results[0]:
        assert_initial(weights)
    # And what the engine saved, at TP=2 and PP=2, is read back without it.
    saved = MegatronCheckpoint(tmp_path / "saved", MODEL)
    assert_initial({n: t for entry in entries(MODEL).values() for n, t in saved.read(entry).items()})


def _load_with_megatron(folder: Path, names: list[str]) -> list[dict[str, torch.Tensor]]:
    from megatron.core import dist_checkpointing

    from stepaudio_train.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(config(name="megatron", tensor_parallel=2, pipeline_parallel=2))
    (module,) = engine._modules
    found = []
    for name in names:
        engine.load_weights(InitialWeights(MODEL, seed=9))
        state = dist_checkpointing.load({"model": module.sharded_state_dict()}, str(folder / name))
        module.load_state_dict(state["model"])
        found.append(dict(engine.export_weights()))
    if engine.is_main:
        (folder / "saved").mkdir()
    engine.barrier()
    engine.save(folder / "saved")
    engine.close()
    return found


def test_deepspeed_reads_what_was_converted(tmp_path):
    write(ZeroThreeWriter(tmp_path / "zero3", MODEL, world_size=2))
    write(UniversalWriter(tmp_path / "universal", MODEL))
    ways = [("zero3", 3), ("universal", 3), ("universal", 1)]
    for by_way in run_distributed(_load_with_deepspeed, 2, tmp_path, ways):
        for weights in by_way:
            assert_initial(weights)
    for name, stage in ways:
        tag = find_tag(tmp_path / f"{name}_saved_{stage}")
        assert tag is not None
        saved = DeepSpeedCheckpoint(tag, MODEL)
        assert_initial({n: t for entry in entries(MODEL).values() for n, t in saved.read(entry).items()})


def _load_with_deepspeed(folder: Path, ways: list[tuple[str, int]]) -> list[dict[str, torch.Tensor]]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.init_distributed("gloo", verbose=False)
    found = []
    for name, stage in ways:
        universal = name == "universal"
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": stage == 1},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            "checkpoint": {"load_universal": universal},
        }
        engine, *_ = deepspeed.initialize(model=Step1ForCausalLM(MODEL), config=settings)
        engine.load_checkpoint(str(folder / name), load_optimizer_states=universal, load_lr_scheduler_states=False)
        parameters = engine.module.named_parameters()
        found.append({key: safe_get_full_fp32_param(parameter).clone() for key, parameter in parameters})
        engine.save_checkpoint(str(folder / f"{name}_saved_{stage}"), tag="step")
    return found
