"""`report.html` of a run on preferences: accuracies and scores, how far confidence can be trusted, what went wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepaudio_train.training.page import Series, charts, line_chart, section, table
from stepaudio_train.training.preferences import HELD_OUT_FILE
from stepaudio_train.training.report import Metrics, series, short, used_files, write_run_report

_SHOWN_PAIRS = 20
_BINS = 10


def write_preference_report(run_dir: Path) -> Path:
    """As `training.report.write_run_report`, of a reward model or a DPO run."""
    return write_run_report(run_dir, _sections)


def reliability(pairs: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean confidence and share of right choices, over pairs of about the same confidence, from 0.5 to 1.

    A model's confidence in its choice is the Bradley-Terry probability of it: sigmoid of the scores' distance.

    Args:
        pairs: lines of held_out_pairs.jsonl.
    """
    differences = np.array([pair["chosen_score"] - pair["rejected_score"] for pair in pairs])
    confidences = 1 / (1 + np.exp(-np.abs(differences)))
    right = (np.sign(differences) + 1) / 2
    bins = np.minimum(((confidences - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    found = [index for index in range(_BINS) if (bins == index).any()]
    return tuple([float(values[bins == index].mean()) for index in found] for values in (confidences, right))


def _sections(run_dir: Path, metrics: Metrics) -> list[str]:
    pairs = _held_out(run_dir / HELD_OUT_FILE)
    lines = [line for line in metrics if any(key.startswith("val/") for key in line)]
    last = (
        {key.removeprefix("val/"): value for key, value in lines[-1].items() if key.startswith("val/")} if lines else {}
    )
    return [
        section("Pairs", _curves(metrics, ""), note="Of the training batches. The loss is in nats a pair."),
        section(
            "Held-out pairs",
            table(("at the end", ""), last.items()) if last else "",
            _curves(lines, "val/") if len(lines) > 1 else "",
        ),
        section(
            "Can its confidence be trusted?",
            charts(reliability_chart(pairs)),
            note="Held-out pairs by the model's confidence in its choice: of those with 0.8, 80% should be right.",
        ),
        section("Most wrong", _most_wrong(pairs), note="Held-out pairs whose rejected answer scores highest."),
        section("Preferences", used_files(run_dir)),
    ]


def _held_out(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _curves(metrics: Metrics, prefix: str) -> str:
    def below(start: str) -> Series:
        keys = dict.fromkeys(key for line in metrics for key in line if key.startswith(prefix + start))
        return series(metrics, list(keys))

    return charts(
        line_chart("Loss", "step", "nats/pair", series(metrics, [f"{prefix}loss"])),
        line_chart("Accuracy", "step", "share of pairs", series(metrics, [f"{prefix}accuracy"])),
        line_chart("Accuracy by category", "step", "share of pairs", below("accuracy/")),
        line_chart("Scores", "step", "", below("score/")),
        line_chart("Rewards", "step", "", below("reward/")),
        line_chart("Log-probabilities", "step", "nats/token", below("log_prob/")),
        line_chart("Calibration error", "step", "", series(metrics, [f"{prefix}calibration_error"])),
    )


def reliability_chart(pairs: Sequence[dict[str, Any]]) -> str:
    """`reliability` as an SVG element; '' without pairs."""
    if not pairs:
        return ""
    lines = {"held-out pairs": reliability(pairs), "as confident as right": ([0.5, 1.0], [0.5, 1.0])}
    return line_chart("Reliability", "confidence", "accuracy", lines)


def _most_wrong(pairs: Sequence[dict[str, Any]]) -> str:
    wrong = [pair for pair in pairs if pair["chosen_score"] < pair["rejected_score"]]
    if not wrong:
        return ""
    keys = ("category", "prompt", "chosen", "rejected", "chosen_score", "rejected_score")
    rows = [[short(pair[key]) if isinstance(pair[key], str) else pair[key] for key in keys] for pair in wrong]
    share = f"{len(wrong)} of {len(pairs)} are wrong, {math.ceil(100 * len(wrong) / len(pairs))}%."
    return f"<p>{share}</p>" + table([key.replace("_", " ") for key in keys], rows[:_SHOWN_PAIRS])
