"""`stepaudio run sft` as a user types it: it learns the answers, and one that was killed goes on as if nothing were."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepaudio_train.config.paths import result_checkpoint
from stepaudio_train.config.schema import ModelConfig, VocabularyConfig
from stepaudio_train.config.sft import SftConfig
from stepaudio_train.engines.build import build_engine
from stepaudio_train.testing.killed_runs import kill_and_run_again
from stepaudio_train.testing.recipes import run_here
from stepaudio_train.testing.token_data import WORDS, write_text_tokenizer
from stepaudio_train.training.report import read_metrics
from stepaudio_train.training.weights import export, initialise

QUIET = ["logging.wandb=disabled", "logging.tensorboard=false", "logging.progress_bar=false", "engine.device=cpu"]
SMALL = ["model=step1_debug", "vocabulary=small", "engine.precision=fp32", "optimizer.learning_rate=3e-3"]
ROWS = ["training.sequence_length=128", "training.global_batch_rows=4", "training.micro_batch_rows=2"]
LAYOUTS = {"local": (1, ["engine=local"]), "megatron": (2, ["engine=megatron"])}
LENGTH = ["data.epochs=1.5", "training.checkpoint_every=4", "training.sample_every=4", "training.num_samples=3"]
LENGTH += ["training.eval_every=2", "training.early_stop.patience=99"]


def spoken(digit: int) -> str:
    """A made-up recording of a digit: the same two groups of codes, always."""
    group = [20 * digit, 20 * digit + 1, *(1024 + 40 * digit + i for i in range(3))]
    return "".join(f"<audio_{code}>" for code in group * 2)


def conversations(count: int, offset: int = 0) -> str:
    """Which digit is said, after a system prompt."""
    lines = []
    for i in range(offset, offset + count):
        digit = i % len(WORDS)
        heard = [{"type": "audio", "tokens": spoken(digit)}]
        turns = (("system", "write down what is said"), ("user", heard), ("assistant", WORDS[digit]))
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Weights with their text tokenizer, conversations with a broken line, and held-out ones."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = write_text_tokenizer(folder / "text.model")
    config = SftConfig(model=ModelConfig(), vocabulary=VocabularyConfig(text_tokenizer=str(tokenizer)))
    engine = build_engine(config)
    initialise(engine, config)
    export(engine, folder / "weights", str(tokenizer), {})
    (folder / "my.jsonl").write_text(conversations(60) + "not JSON\n")
    (folder / "held_out.jsonl").write_text(conversations(10))
    return folder


def typed(files: Path, run_dir: Path, *overrides: str) -> list[str]:
    data = [f"model.init={files / 'weights'}", f"data={files / 'my.jsonl'}", f"validation={files / 'held_out.jsonl'}"]
    return [*SMALL, *ROWS, *QUIET, *data, *overrides, f"run_dir={run_dir}"]


def command(files: Path, run_dir: Path, num_processes: int, *overrides: str) -> list[str]:
    program = [sys.executable, "-m", "stepaudio_train.cli", "run", "sft"]
    return [*program, *typed(files, run_dir, *overrides), "--nproc", str(num_processes)]


def trajectory(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory) -> dict[str, Path]:
    """Run directories of runs that nothing disturbed."""
    runs = {name: tmp_path_factory.mktemp("runs") / name for name in LAYOUTS}
    for name, (num_processes, overrides) in LAYOUTS.items():
        arguments = command(files, runs[name], num_processes, *LENGTH, *overrides)
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "left out" in done.stderr and "my.jsonl:61" in done.stderr
    return runs


def test_answers_are_learned_alike_in_one_process_and_two(straight):
    local, megatron = (read_metrics(straight[name] / "metrics.jsonl") for name in LAYOUTS)
    assert [line["loss"] for line in megatron] == pytest.approx([line["loss"] for line in local], rel=1e-4)
    assert local[-1]["val/loss"] == local[-1]["val/loss/task/aqta"] < 0.5 * local[0]["loss"]
    assert megatron[-1]["val/loss/text"] == pytest.approx(local[-1]["val/loss/text"], rel=1e-4)


def test_run_directory_says_what_was_learned_from(straight):
    run = straight["local"]
    report = json.loads((run / "data_report.json").read_text())
    assert (report["data"]["conversations"], report["data"]["num_refused"]) == (60, 1)
    assert report["validation"]["conversations"] == 10
    assert f"max_steps: {len(read_metrics(run / 'metrics.jsonl'))}\n" in (run / "config.yaml").read_text()
    exported = {path.name for path in (run / "export").iterdir()}
    assert {"config.json", "tokenizer.model", "model.safetensors.index.json"} <= exported


def test_samples_show_held_out_conversations_alike_in_one_process_and_two(straight):
    local, megatron = ({p.name: p.read_text() for p in (straight[name] / "samples").iterdir()} for name in LAYOUTS)
    assert local == megatron and "step_00000004.jsonl" in local
    lines = [json.loads(line) for line in local[max(local)].splitlines()]
    assert [(line["id"], line["task"], line["reference"]) for line in lines] == [
        (i, "aqta", WORDS[i]) for i in range(3)
    ]
    assert all(spoken(i) in line["prompt"] and "answer" in line for i, line in enumerate(lines))


def test_the_result_is_the_best_weights(straight):
    for run in straight.values():
        best = min(
            (line["val/loss"], line["step"]) for line in read_metrics(run / "metrics.jsonl") if "val/loss" in line
        )
        assert result_checkpoint(run / "checkpoints").name == f"step_{best[1]:08d}"
        assert f"| val/loss | {best[0]:.6g} |" in (run / "export" / "README.md").read_text()


def test_killed_run_goes_on_bit_for_bit(files, straight, tmp_path):
    num_processes, overrides = LAYOUTS["local"]
    arguments = command(files, tmp_path / "killed", num_processes, *LENGTH, *overrides)
    assert "going on from step" in kill_and_run_again(arguments, tmp_path / "killed", after_steps=6)
    assert trajectory(tmp_path / "killed") == trajectory(straight["local"])
    ends = [result_checkpoint(run / "checkpoints").name for run in (tmp_path / "killed", straight["local"])]
    assert ends[0] == ends[1]


def test_refused_command_says_what_to_type(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        run_here("sft", typed(files, tmp_path / "run", "data=absent.jsonl"))
    assert refusal.value.code == 2 and "data=absent.jsonl: no such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
