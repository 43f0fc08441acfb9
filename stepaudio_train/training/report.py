"""`report.html` of one training run, from the files in its directory alone."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepaudio_train.training.page import Series, charts, details, environment, line_chart, page, section, table

Metrics = list[dict[str, float]]

_SHOWN_REFUSALS = 50


def read_metrics(path: Path) -> Metrics:
    """The lines of a metrics.jsonl; a last line that a kill cut in half is left out, no file is an empty list.

    Raises:
        ValueError: a line before the last is not JSON; the message names it.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    metrics: Metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: is not JSON: {error}") from error
    return metrics


def series(metrics: Metrics, keys: Sequence[str], x_key: str = "step") -> Series:
    """The lines `keys` over `x_key`, named without their prefix; steps that lack a key have no point."""
    found = {}
    for key in keys:
        points = [(line[x_key], line[key]) for line in metrics if key in line]
        found[key.rsplit("/", 1)[-1]] = ([x for x, _ in points], [y for _, y in points])
    return found


def modality_keys(metrics: Metrics, prefix: str = "loss/") -> list[str]:
    """`loss/text`, `loss/semantic`, ...: those that any line has."""
    return sorted({k for line in metrics for k in line if k.startswith(prefix) and "/task/" not in k})


def task_keys(metrics: Metrics, prefix: str = "loss/") -> list[str]:
    """`loss/task/asr`, ...: those that any line has."""
    return sorted({k for line in metrics for k in line if k.startswith(f"{prefix}task/")})


def language_model_sections(run_dir: Path, metrics: Metrics) -> list[str]:
    """What a run learned that predicts tokens."""
    return [
        section("Losses", _loss_charts(metrics), note="Nats per token, on the training batches."),
        section("Held-out losses", _validation(metrics), note="Nats per token, on the validation data."),
        section("Conversations", used_files(run_dir)),
        section("Answers while it learned", _samples(run_dir)),
    ]


def write_run_report(run_dir: Path, learned: Callable[[Path, Metrics], list[str]] = language_model_sections) -> Path:
    """Write `run_dir`/report.html; returns its path. A run without any metrics gets a page that says so.

    Args:
        learned: the sections on what the run learned.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl")
    config_file = run_dir / "config.yaml"
    config = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    last = f"{len(metrics)} logged steps" if metrics else "no step was logged"
    sections = [
        section("Summary", _summary(metrics)),
        *learned(run_dir, metrics),
        section("Optimisation and speed", _speed_charts(metrics)),
        section("What ran", table(("", ""), environment().items()), details("config.yaml", config)),
    ]
    path = run_dir / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page(f"Run {run_dir.name}", last, sections), encoding="utf-8")
    temporary.replace(path)
    return path


def conversation_tables(used: Mapping[str, Any]) -> str:
    """What a run used of one file of conversations, preferences or prompts, and what it left out and why.

    Args:
        used: an entry of data_report.json.
    """
    what = next(name for name in ("pairs", "conversations", "prompts") if name in used)
    kinds = used["categories" if what == "pairs" else "tasks"]
    rows = [
        (what, used[what]),
        ("of these", ", ".join(f"{count} {kind}" for kind, count in kinds.items())),
        ("tokens", used["tokens"]),
        *([("tokens that teach", used["tokens_with_loss"])] if "tokens_with_loss" in used else []),
        ("left out", used["num_refused"]),
    ]
    refused = [(refusal["name"], refusal["reason"]) for refusal in used["refused"][:_SHOWN_REFUSALS]]
    return table((used["path"], ""), rows) + (table(("left out", "why"), refused) if refused else "")


def used_files(run_dir: Path) -> str:
    """The tables of data_report.json; '' if there is none."""
    file = run_dir / "data_report.json"
    if not file.is_file():
        return ""
    return "".join(conversation_tables(used) for used in json.loads(file.read_text(encoding="utf-8")).values())


def _samples(run_dir: Path) -> str:
    """The newest ones."""
    files = sorted((run_dir / "samples").glob("step_*.jsonl"))
    if not files:
        return ""
    lines = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    rows = [(line["task"], *(short(line[key]) for key in ("prompt", "reference", "answer"))) for line in lines]
    return table((files[-1].stem, "asked", "expected", "answered"), rows)


def short(text: str) -> str:
    """Audio as the number of its codes, so that what is written can be read."""
    return re.sub(r"(?:<audio_\d+>)+", lambda run: f" [{run[0].count('<')} audio tokens] ", text)


def _summary(metrics: Metrics) -> str:
    if not metrics:
        return ""
    last = metrics[-1]
    rows: list[tuple[str, object]] = [("steps", int(last["step"])), ("loss at the end", float(last["loss"]))]
    if "tokens" in last:
        rows.append(("tokens", int(last["tokens"])))
    for key, name in (("tokens_per_s", "tokens/s (median step)"), ("mfu", "MFU (median step)")):
        values = [line[key] for line in metrics if key in line]
        if values:
            rows.append((name, float(statistics.median(values))))
    if "elapsed_s" in last:
        rows.append(("minutes", last["elapsed_s"] / 60))
    return table(("", ""), rows)


def _loss_charts(metrics: Metrics) -> str:
    return charts(
        line_chart("Loss", "step", "nats/token", series(metrics, ["loss"])),
        line_chart("By modality", "step", "nats/token", series(metrics, modality_keys(metrics))),
        line_chart("By task", "step", "nats/token", series(metrics, task_keys(metrics))),
    )


def _validation(metrics: Metrics) -> str:
    lines = [line for line in metrics if any(key.startswith("val/") for key in line)]
    if not lines:
        return ""
    keys = modality_keys(lines, "val/loss") + task_keys(lines, "val/loss/")
    final = table(("at the end", "nats/token"), [(key.removeprefix("val/"), lines[-1].get(key)) for key in keys])
    if len(lines) == 1:
        return final
    return final + charts(line_chart("Held-out", "step", "nats/token", series(lines, keys)))


def _speed_charts(metrics: Metrics) -> str:
    return charts(
        line_chart("Tokens per second", "step", "tokens/s", series(metrics, ["tokens_per_s"])),
        line_chart("Gradient norm", "step", "L2, before clipping", series(metrics, ["grad_norm"])),
        line_chart("Learning rate", "step", "", series(metrics, ["learning_rate"])),
        line_chart("MFU", "step", "share of peak", series(metrics, ["mfu"])),
    )
