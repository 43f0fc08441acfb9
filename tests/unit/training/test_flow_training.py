"""Training of the flow: the loss falls, a run that was stopped goes on bit for bit, wrong settings are told at once."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import recipes.flow as recipe
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.decoder import FlowConfig
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.flow_training import (
    FlowOptimizerConfig,
    FlowTrainConfig,
    FlowTrainingConfig,
    flow_train_problems,
)
from stepaudio_train.config.schema import LoggingConfig
from stepaudio_train.config.speaker import SpeakerEncoderConfig
from stepaudio_train.models.decoder.flow_files import NoSpeaker, find_speaker, load_flow
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder, SpeakerError
from stepaudio_train.testing.paired_data import PairedCorpus, write_paired_corpus
from stepaudio_train.training import learning
from stepaudio_train.training.flow import FlowLearner

SIZES = FlowConfig(
    hidden_size=32, ffn_size=32, num_blocks=1, decoder_channels=32, decoder_head_size=16, decoder_mid_blocks=1
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> PairedCorpus:
    return write_paired_corpus(tmp_path_factory.mktemp("paired"), num_clips=16)


@pytest.fixture
def config(corpus, tmp_path) -> FlowTrainConfig:
    return FlowTrainConfig(
        run_dir=str(tmp_path / "run"),
        corpus=str(corpus.prepared),
        tokens=str(corpus.tokens),
        flow=SIZES,
        optimizer=FlowOptimizerConfig(warmup_steps=10, average=0.9),
        training=FlowTrainingConfig(
            max_steps=6, encoder_steps=0, log_every=1, eval_every=3, checkpoint_every=4, batch_frames=250
        ),
        logging=LoggingConfig(tensorboard=False, wandb="disabled", progress_bar=False),
        device="cpu",
    )


@pytest.fixture(autouse=True)
def no_log_files(monkeypatch) -> None:
    monkeypatch.setattr(learning, "log_to_file", lambda folder, rank: None)


def metrics(config: FlowTrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "steps_per_s"} for line in lines]


def stop_behind(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a scheduler's signal come while `step` is computed."""
    learned = FlowLearner.step

    def interrupted(learner: FlowLearner, number: int, batch: Any) -> dict[str, float]:
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return learned(learner, number, batch)

    monkeypatch.setattr(FlowLearner, "step", interrupted)


def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    recipe.main(config)
    with monkeypatch.context() as patch:
        stop_behind(3, patch)
        recipe.main(stopped)
    assert len(metrics(stopped)) == 3 and not (tmp_path / "stopped" / "flow.safetensors").exists()
    recipe.main(stopped)
    assert metrics(stopped) == metrics(config) and len(metrics(config)) == 6
    for name in ("flow.safetensors", "checkpoints/step_00000006/optimizer.safetensors"):
        first, second = (load_file(Path(c.run_dir) / name) for c in (config, stopped))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_follows_from_its_seed_whoever_reads(config, tmp_path):
    short = replace(config, training=replace(config.training, max_steps=2))
    readers = replace(short, run_dir=str(tmp_path / "readers"), num_workers=2)
    other = replace(short, run_dir=str(tmp_path / "other"), seed=1)
    for one in (short, readers, other):
        recipe.main(one)
    assert metrics(readers) == metrics(short)
    assert metrics(other)[0]["loss"] != metrics(short)[0]["loss"]


def test_half_precision_gives_nearly_the_same_loss(config, tmp_path):
    short = replace(config, training=replace(config.training, max_steps=3))
    half = replace(short, run_dir=str(tmp_path / "half"), precision="bf16")
    for one in (short, half):
        recipe.main(one)
    exact, rounded = ([line["loss"] for line in metrics(one)] for one in (short, half))
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact


def test_a_loss_that_is_not_finite_is_told(config, tmp_path):
    recipe.main(replace(config, training=replace(config.training, max_steps=1)))
    weights = load_file(Path(config.run_dir) / "flow.safetensors")
    save_file({name: tensor / 0 for name, tensor in weights.items()}, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match="step 1: the loss is nan; checkpoints are untouched"):
        recipe.main(replace(config, run_dir=str(tmp_path / "nan"), init=str(tmp_path / "broken.safetensors")))


def test_training_lowers_the_held_out_loss(config):
    longer = replace(config.training, max_steps=60, eval_every=12)
    recipe.main(replace(config, training=longer, optimizer=replace(config.optimizer, learning_rate=5e-3)))
    held_out = [line["val/loss"] for line in metrics(config) if "val/loss" in line]
    assert len(held_out) == 5 and held_out[-1] < 0.7 * held_out[0]
    flow = load_flow(Path(config.run_dir))
    assert flow.config == SIZES and not flow.training
    assert isinstance(find_speaker(Path(config.run_dir), 192), NoSpeaker)


def test_training_hears_the_speaker_and_goes_on_from_weights(config, tmp_path):
    encoder = SmallSpeakerEncoder(SpeakerEncoderConfig(channels=8))
    encoder.save(tmp_path / "voices.safetensors")
    short = replace(config, training=replace(config.training, max_steps=1))
    recipe.main(replace(short, run_dir=str(tmp_path / "told"), speaker=str(tmp_path / "voices.safetensors")))
    recipe.main(short)
    told = replace(short, run_dir=str(tmp_path / "told"))
    assert metrics(told)[0]["loss"] != metrics(short)[0]["loss"]
    kept = find_speaker(tmp_path / "told", 192)
    assert isinstance(kept, SmallSpeakerEncoder) and torch.equal(kept.voice.weight, encoder.voice.weight)
    with pytest.raises(SpeakerError, match="gives vectors of 192, and the flow takes 64"):
        find_speaker(tmp_path / "told", 64)
    again = replace(short, run_dir=str(tmp_path / "again"), init=str(tmp_path / "told" / "flow.safetensors"), seed=5)
    recipe.main(again)
    trained, begun = load_flow(tmp_path / "again"), load_flow(tmp_path / "told")
    assert (trained.input_embedding.weight - begun.input_embedding.weight).abs().max() < 0.01


def test_problems_are_told_at_once(config, tmp_path):
    wrong = [f"corpus={tmp_path}/none", f"tokens={config.tokens}", "flow.vocab_size=100", "optimizer.average=1"]
    with pytest.raises(ConfigError) as error:
        load_config("flow", FlowTrainConfig, [*wrong, "training.batch_frames=0", "init=none.pt"], flow_train_problems)
    assert [problem.split("=")[0] for problem in error.value.problems] == [
        "flow.vocab_size",
        "corpus",
        "init",
        "training.batch_frames",
        "optimizer.average",
    ]


def test_the_released_experiment_has_the_released_sizes(config):
    folders = [f"corpus={config.corpus}", f"tokens={config.tokens}"]
    released = load_config("flow", FlowTrainConfig, ["experiment=flow_released", *folders], flow_train_problems)
    assert released.flow == FlowConfig.released()
