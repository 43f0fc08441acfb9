"""The training loop on the local engine: resume, signals, failures, and what a run leaves behind."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.data.loader import build_train_loader
from stepaudio_train.engines.base import NonFiniteError
from stepaudio_train.engines.build import build_engine
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.testing.small_runs import SMALL_RUN as CONFIG
from stepaudio_train.testing.small_runs import VOCABULARY
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training import checkpoints as checkpoints_module
from stepaudio_train.training.checkpoints import CheckpointError, latest_checkpoint
from stepaudio_train.training.loop import fit
from stepaudio_train.training.run_directory import RunDirectory


def run(config: PretrainConfig, run_dir: Path, init: str | None = None, **training: object) -> list[dict]:
    """Train in this process; the lines of metrics.jsonl."""
    model = replace(config.model, init=init)
    config = replace(config, run_dir=str(run_dir), model=model, training=replace(config.training, **training))
    directory = RunDirectory(run_dir)
    directory.claim(config)
    vocabulary = Vocabulary.from_config(config.vocabulary)
    t = config.training
    loader = build_train_loader(config.data, vocabulary, t.sequence_length, t.global_batch_rows, t.seed)
    try:
        fit(config, build_engine(config), loader, LanguageModelling(vocabulary), directory)
    finally:
        directory.release()
    return [json.loads(line) for line in directory.metrics_file.read_text().splitlines()]


def losses(lines: list[dict]) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, run(CONFIG, folder)


def test_loss_falls_and_metrics_are_told_apart(straight):
    _, lines = straight
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    last = lines[-1]
    assert {"loss/text", "loss/linguistic", "loss/semantic", "tokens_per_s", "mfu", "learning_rate"} <= last.keys()
    assert 0.5 < last["packing/fill"] <= 1 and last["packing/cost_max_over_mean"] == 1, "one rank is the mean"


def test_resumed_run_repeats_the_straight_one_bit_for_bit(straight, tmp_path):
    run(CONFIG, tmp_path / "run", max_steps=3)
    lines = run(CONFIG, tmp_path / "run")
    assert losses(lines) == losses(straight[1])


def test_steps_logged_after_the_last_checkpoint_are_forgotten(straight, tmp_path):
    run(CONFIG, tmp_path / "run", max_steps=3)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0, "grad_norm": 1.0}\n{"step": 5, "lo')
    assert losses(run(CONFIG, tmp_path / "run")) == losses(straight[1])


def test_micro_batches_change_rounding_only(straight, tmp_path):
    for a, b in zip(run(CONFIG, tmp_path / "run", micro_batch_rows=1), straight[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_packed_rows_equal_one_document_a_row(straight, tmp_path):
    data = replace(CONFIG.data, synthetic_documents="single")
    rows = 4 * 2  # two made-up documents fill a row of 64
    lines = run(replace(CONFIG, data=data), tmp_path / "run", global_batch_rows=rows, micro_batch_rows=rows)
    for a, b in zip(lines, straight[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("recompute", ["full", "offload"])
def test_recompute_changes_nothing(straight, tmp_path, recompute):
    lines = run(replace(CONFIG, engine=replace(CONFIG.engine, recompute=recompute)), tmp_path / "run")
    assert losses(lines) == losses(straight[1])


def test_sigterm_saves_and_the_same_command_goes_on(straight, tmp_path, monkeypatch):
    from stepaudio_train.data.synthetic import SyntheticLoader

    original = SyntheticLoader.next_batch

    def next_batch(self):
        if self._step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(SyntheticLoader, "next_batch", next_batch)
    lines = run(CONFIG, tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step_00000003"
    assert not (tmp_path / "run" / "export").exists()
    monkeypatch.undo()
    assert losses(run(CONFIG, tmp_path / "run")) == losses(straight[1])


def test_non_finite_loss_stops_with_the_batch(tmp_path):
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, learning_rate=1e30, clip_grad_norm=0.0))
    with pytest.raises(NonFiniteError, match="no weight was changed"):
        run(config, tmp_path / "run")
    reports = list((tmp_path / "run" / "nonfinite").glob("*.json"))
    assert len(reports) == 1 and json.loads(reports[0].read_text())["rows"] == 4


def test_full_disk_keeps_what_there_was(tmp_path, monkeypatch):
    run(CONFIG, tmp_path / "run", max_steps=3)
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(checkpoints_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(CheckpointError, match=r"disk full.*step_00000003"):
        run(CONFIG, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_00000003"]


def test_old_checkpoints_are_pruned(tmp_path):
    run(CONFIG, tmp_path / "run", checkpoint_every=1, keep_checkpoints=2)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_00000005", "step_00000006"]


def test_a_run_directory_in_use_is_refused(tmp_path):
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.claim(CONFIG)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        second.claim(CONFIG)
    first.release()
    second.claim(CONFIG)


def test_other_settings_and_foreign_folders_are_refused(tmp_path):
    RunDirectory(tmp_path / "run").claim(CONFIG)
    with pytest.raises(ConfigError, match="training.seed=5"):
        RunDirectory(tmp_path / "run").claim(replace(CONFIG, training=replace(CONFIG.training, seed=5)))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(ConfigError, match="no run directory"):
        RunDirectory(tmp_path / "thesis").claim(CONFIG)


def test_next_stage_starts_from_the_exported_weights(straight, tmp_path):
    lines = run(CONFIG, tmp_path / "next", init=str(straight[0]), max_steps=1)
    assert lines[0]["loss"] < straight[1][2]["loss"]


def test_a_text_only_vocabulary_is_grown(tmp_path):
    text_only = Step1ForCausalLM(replace(CONFIG.model, vocab_size=VOCABULARY.text_size))
    text_only.save_pretrained(tmp_path / "text")
    run(CONFIG, tmp_path / "run", init=str(tmp_path / "text"), max_steps=1)
    grown = Step1ForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert grown.lm_head.weight.shape == (VOCABULARY.total_size, 32)
    # One step of Adam moves a weight by about the learning rate.
    moved = (grown.lm_head.weight[: VOCABULARY.text_size] - text_only.lm_head.weight).abs().max()
    assert moved < 0.02 < text_only.lm_head.weight.abs().max()


def test_weights_that_do_not_fit_are_named(straight, tmp_path):
    config = replace(CONFIG, model=replace(CONFIG.model, intermediate_size=64))
    with pytest.raises(ConfigError, match="type model.intermediate_size=48"):
        run(config, tmp_path / "run", init=str(straight[0]))


def test_exported_tensors_are_the_last_checkpoints(straight):
    from safetensors.torch import load_file

    exported = load_file(straight[0] / "export" / "model-00001.safetensors")
    saved = load_file(straight[0] / "checkpoints" / "step_00000006" / "engine" / "model.safetensors")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
