"""Early stop: when it ends a run, that it goes on exactly, and that the best weights are the result."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import EarlyStopConfig, LoraConfig, PretrainConfig
from stepaudio_train.convert.sources import LazyWeights, open_source
from stepaudio_train.data.loader import build_train_loader
from stepaudio_train.engines.build import build_engine
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.testing.small_runs import SMALL_RUN, VOCABULARY
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.checkpoints import CheckpointError, read_state
from stepaudio_train.training.early_stop import Best, EarlyStop
from stepaudio_train.training.loop import fit
from stepaudio_train.training.run_directory import RunDirectory

CONFIG = replace(
    SMALL_RUN,
    training=replace(
        SMALL_RUN.training,
        max_steps=9,
        eval_every=1,
        log_every=10,
        keep_checkpoints=1,
        early_stop=EarlyStopConfig(patience=3),
    ),
)
HELD_OUT = {1: 5.0, 2: 4.0, 3: 3.0, 4: 3.5, 5: 3.1, 6: 3.0, 7: 2.0, 8: 2.0, 9: 2.0}
"""Step -> made-up held-out loss: the best of the first six is step 3's, after which patience 3 ends the run."""


@pytest.fixture(scope="module", autouse=True)
def made_up_evaluations():
    def evaluate(self, micro_batches, objective):
        (step, *_) = (int(state["step"]) for state in self.optimizer.state.values())
        return {"loss": (2 * HELD_OUT[step], 2.0)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "evaluate", evaluate)
        yield


def run(run_dir: Path, sampler=None, config: PretrainConfig = CONFIG, **training: object) -> list[dict]:
    """Train in this process; the lines of metrics.jsonl."""
    config = replace(config, run_dir=str(run_dir), training=replace(config.training, **training))
    directory = RunDirectory(run_dir)
    directory.claim(config)
    vocabulary, t = Vocabulary.from_config(VOCABULARY), config.training
    loaders = [build_train_loader(config.data, vocabulary, t.sequence_length, t.global_batch_rows, i) for i in (0, 1)]
    held_out = [loaders[1].next_batch()]
    try:
        fit(config, build_engine(config), loaders[0], LanguageModelling(vocabulary), directory, held_out, sampler)
    finally:
        directory.release()
    return [json.loads(line) for line in directory.metrics_file.read_text().splitlines()]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir())


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "model-00001.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, made_up_evaluations) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(folder)
    return folder


def test_a_run_ends_after_evaluations_without_improvement(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    # Held-out losses are logged whatever log_every says.
    assert [(line["step"], line["val/loss"]) for line in lines] == [(s, HELD_OUT[s]) for s in range(1, 7)]
    assert checkpoints(straight) == [3, 6]
    assert read_state(straight / "checkpoints" / "step_00000006").best == Best("val/loss", 3, 3.0, 3)
    assert "| val/loss | 3 |" in (straight / "export" / "README.md").read_text()


def test_the_best_weights_are_exported_and_are_what_the_next_run_starts_from(straight):
    best = load_file(straight / "checkpoints" / "step_00000003" / "engine" / "model.safetensors")
    last = load_file(straight / "checkpoints" / "step_00000006" / "engine" / "model.safetensors")
    assert same(exported(straight), best) and not same(best, last)
    assert same(dict(LazyWeights(open_source(straight).reader, CONFIG.model)), best)


def test_a_run_that_was_stopped_goes_on_exactly(straight, tmp_path, monkeypatch):
    from stepaudio_train.data.synthetic import SyntheticLoader

    original = SyntheticLoader.next_batch

    def next_batch(self):
        if self._step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticLoader, "next_batch", next_batch)
        assert [line["step"] for line in run(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert checkpoints(tmp_path / "run") == [3, 5] and not (tmp_path / "run" / "export").exists()
    assert [line["step"] for line in run(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(tmp_path / "run") == [3, 6]
    assert same(exported(tmp_path / "run"), exported(straight))
    states = [read_state(folder / "checkpoints" / "step_00000006") for folder in (straight, tmp_path / "run")]
    assert states[0].best == states[1].best


def test_the_same_command_again_changes_nothing_and_more_patience_goes_on(straight, tmp_path):
    before = exported(straight)
    assert [line["step"] for line in run(straight)] == [1, 2, 3, 4, 5, 6]
    assert same(exported(straight), before)
    lines = run(tmp_path / "run", early_stop=EarlyStopConfig(patience=1))
    assert lines[-1]["step"] == 4
    lines = run(tmp_path / "run", early_stop=EarlyStopConfig(patience=4))
    assert (lines[-1]["step"], checkpoints(tmp_path / "run")) == (9, [7, 9])


def test_best_weights_that_are_gone_are_named(tmp_path):
    run(tmp_path / "run", max_steps=4)
    (tmp_path / "run" / "checkpoints" / "step_00000003").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="step_00000003: held the run's best weights"):
        run(tmp_path / "run", max_steps=4)


def test_without_it_the_last_weights_are_the_result(tmp_path):
    run(tmp_path / "run", early_stop=None, max_steps=5)
    last = load_file(tmp_path / "run" / "checkpoints" / "step_00000005" / "engine" / "model.safetensors")
    assert same(exported(tmp_path / "run"), last) and checkpoints(tmp_path / "run") == [5]


class Recorder:
    """A sampler that keeps the weights it is shown."""

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self.seen: list[tuple[int, dict[str, torch.Tensor]]] = []

    def __call__(self, engine, step):
        self.seen.append((step, dict(engine.export_weights())))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["all weights", "adapters"])
def test_samples_are_drawn_on_the_way_and_of_the_result(straight, tmp_path, lora):
    recorder = Recorder(every_steps=1)
    run(tmp_path / "run", recorder, replace(CONFIG, model=replace(CONFIG.model, init=str(straight)), lora=lora))
    assert [step for step, _ in recorder.seen] == [1, 2, 3, 4, 5, 3]
    weights = [weights for _, weights in recorder.seen]
    assert same(weights[2], weights[-1]) and not same(weights[4], weights[-1])
    assert same(weights[-1], exported(tmp_path / "run"))


def test_samples_are_drawn_every_so_many_steps(tmp_path):
    recorder = Recorder(every_steps=2)
    run(tmp_path / "run", recorder, early_stop=None, max_steps=4)
    assert [step for step, _ in recorder.seen] == [2, 4]


def judged(values: list[float], config: EarlyStopConfig, best: Best | None = None) -> list[tuple]:
    early_stop, seen = EarlyStop(config, best), []
    for step, value in enumerate(values, 1):
        early_stop.judge(step, {config.metric: value, "val/loss/text": 0.0})
        seen.append((early_stop.best.step, early_stop.best.num_worse, early_stop.reached))
    return seen


def test_better_means_by_more_than_min_delta():
    config = EarlyStopConfig(patience=2, min_delta=0.25)
    # Small steps down add up: they are measured from the best, not from the last.
    assert judged([2.0, 1.875, 1.625, 1.5, 1.375], config) == [
        (1, 0, False),
        (1, 1, False),
        (3, 0, False),
        (3, 1, False),
        (3, 2, True),
    ]
    assert judged([2.0, 2.0], EarlyStopConfig(patience=1)) == [(1, 0, False), (1, 1, True)]


def test_what_is_not_finite_is_never_better():
    assert judged([float("nan"), 9.0, float("nan")], EarlyStopConfig(patience=1)) == [
        (1, 0, False),
        (2, 0, False),
        (2, 1, True),
    ]


def test_a_best_value_of_another_metric_is_forgotten():
    other = Best("val/loss/text", 1, 0.5, 7)
    assert EarlyStop(EarlyStopConfig(), other).best is None
    assert EarlyStop(None, other).best is None and not EarlyStop(None, other).reached
    assert EarlyStop(EarlyStopConfig(metric="val/loss/text"), other).reached


def test_a_metric_that_is_not_measured_is_told_with_those_that_are():
    with pytest.raises(UserError, match=r"val/loss/task/asr: .* type one of val/loss, val/loss/text"):
        EarlyStop(EarlyStopConfig(metric="val/loss/task/asr"), None).judge(1, {"val/loss/text": 1.0, "val/loss": 1.0})
