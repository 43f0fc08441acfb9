"""`report.html` of a PPO or GRPO run: what answers were paid, how far the policy went, what it answers."""

from __future__ import annotations

import json
from pathlib import Path

from stepaudio_train.training.page import charts, line_chart, section, table
from stepaudio_train.training.report import Metrics, series, short, used_files, write_run_report

_SHOWN_SAMPLES = 20


def write_policy_report(run_dir: Path) -> Path:
    """As `training.report.write_run_report`."""
    return write_run_report(run_dir, _sections)


def _sections(run_dir: Path, metrics: Metrics) -> list[str]:
    return [
        section("Rewards", _rewards(metrics), note="Of the answers of each iteration, before they are learned from."),
        section("Answers", _lengths(metrics)),
        section("Deafness", _deafness(metrics), note="Percent of answers that say that the question was not heard."),
        section("How far the policy went", _distances(metrics), note="Nats. The reference is what the run began with."),
        section("Losses", _losses(metrics)),
        section("What it answers", _samples(run_dir)),
        section("Prompts", used_files(run_dir)),
    ]


def _rewards(metrics: Metrics) -> str:
    parts = sorted({key for line in metrics for key in line if key.startswith("reward/")})
    return charts(
        line_chart("Score", "step", "", series(metrics, ["score"])),
        line_chart("Parts, before their weights", "step", "", series(metrics, parts)),
        line_chart("Spread of scores", "step", "standard deviation", series(metrics, ["score_std"])),
        line_chart("Prompts whose answers are paid alike", "step", "share", series(metrics, ["groups_alike"])),
    )


def _lengths(metrics: Metrics) -> str:
    return charts(
        line_chart("Length", "step", "tokens", series(metrics, ["length", "length_max"])),
        line_chart("Answers that end", "step", "share", series(metrics, ["ended"])),
    )


def _deafness(metrics: Metrics) -> str:
    return charts(line_chart("Deaf answers", "step", "%", series(metrics, ["deaf_rate_clear", "deaf_rate_unclear"])))


def _distances(metrics: Metrics) -> str:
    return charts(
        line_chart("From the reference", "step", "nats/answer", series(metrics, ["kl/answer"])),
        line_chart("From the reference", "step", "nats/token", series(metrics, ["kl/reference"])),
        line_chart("From the policy that answered", "step", "nats/token", series(metrics, ["kl/old_k1", "kl/old_k3"])),
        line_chart("Entropy", "step", "nats/token", series(metrics, ["entropy"])),
        line_chart("Clipped tokens", "step", "share", series(metrics, ["clip_fraction"])),
    )


def _losses(metrics: Metrics) -> str:
    return charts(
        line_chart("Policy", "step", "", series(metrics, ["loss/policy"])),
        line_chart("Critic", "step", "", series(metrics, ["loss/value"])),
        line_chart("Explained variance of returns", "step", "", series(metrics, ["value/explained_variance"])),
    )


def _samples(run_dir: Path) -> str:
    """The newest ones."""
    files = sorted((run_dir / "samples").glob("step_*.jsonl"))
    if not files:
        return ""
    lines = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()][:_SHOWN_SAMPLES]
    rows = [(*(short(line[key]) for key in ("prompt", "reference", "answer")), line["score"]) for line in lines]
    return table((files[-1].stem, "the file's answer", "answered", "score"), rows)
