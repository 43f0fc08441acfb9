"""What the quick start's reward model and PPO came to: their figures, and a section of its report."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepaudio_train.data.preference_files import PreferenceFile
from stepaudio_train.evaluation.word_errors import normalise
from stepaudio_train.training.page import charts, judged, line_chart, section, table
from stepaudio_train.training.preference_report import reliability_chart
from stepaudio_train.training.preferences import HELD_OUT_FILE
from stepaudio_train.training.report import Metrics, read_metrics, series

_SHOWN_ANSWERS = 12


@dataclass(frozen=True)
class Answers:
    """What a model answered to the held-out questions."""

    lines: list[dict[str, Any]]
    """answers.jsonl."""
    exchanged_exact: float
    """Percent of right answers where another question is heard."""

    @classmethod
    def read(cls, folder: Path) -> Answers:
        """Raises OSError or ValueError if the output of `stepaudio evaluate answers` is not there."""
        found = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        return cls(_lines(folder / "answers.jsonl"), found["scores_exchanged_audio"]["aqta"]["exact"])

    @property
    def right(self) -> NDArray[np.float64]:
        """[N] float: 1 for an answer that is the right one word for word."""
        return np.array([float(normalise(one["answer"]) == normalise(one["reference"])) for one in self.lines])


@dataclass(frozen=True)
class RewardResults:
    """What the parts that learn from preferences and rewards have written, read back."""

    reward: Metrics
    pairs: list[dict[str, Any]]
    """Lines of the reward model's held_out_pairs.jsonl."""
    ppo: Metrics
    before: Answers
    """The fine-tuned model's."""
    after: Answers
    """The same questions, answered after PPO."""
    questions: dict[str, str]
    """Id -> what is asked, as it was spoken."""

    @classmethod
    def read(cls, run: Path) -> RewardResults:
        """Raises OSError or ValueError if a part's output is not there."""
        folder = run / "preferences"
        asked = PreferenceFile.read(folder / "held_out_preferences.jsonl").preferences
        return cls(
            reward=read_metrics(run / "reward" / "metrics.jsonl"),
            pairs=_lines(run / "reward" / HELD_OUT_FILE),
            ppo=read_metrics(run / "ppo" / "metrics.jsonl"),
            before=Answers.read(folder / "before"),
            after=Answers.read(folder / "after"),
            questions={one.prompt.id: " ".join(p.text or "" for p in one.prompt.audio_parts()) for one in asked},
        )

    def summary(self) -> dict[str, float]:
        """Percent. The score is the true one, of right answers, not the reward model's."""
        right = [pair["chosen_score"] > pair["rejected_score"] for pair in self.pairs]
        before, after = self.before.right, self.after.right
        return {
            "reward_accuracy": round(100 * sum(right) / len(right), 2),
            "ppo_score_before": round(100 * float(before.mean()), 2),
            "ppo_score_after": round(100 * float(after.mean()), 2),
            "ppo_score_after_shuffled_audio": round(self.after.exchanged_exact, 2),
            # Each question's two answers are compared: what is hard is hard for both.
            "ppo_gain_standard_error": round(100 * _standard_error(after - before), 2),
        }


def reward_section(found: RewardResults) -> str:
    """Accuracy and calibration of the reward model, PPO's curves, and answers before and after."""
    summary = found.summary()
    rows = [
        (title, 100 * answers.right.mean(), 100 * _standard_error(answers.right), answers.exchanged_exact)
        for title, answers in (("fine-tuned", found.before), ("after PPO", found.after))
    ]
    head = ("", "right, %", "standard error", "right with shuffled audio, %")
    categories = sorted({pair["category"] for pair in found.pairs})
    kinds = [("all", found.pairs), *((c, [p for p in found.pairs if p["category"] == c]) for c in categories)]
    accuracies = [
        (name, len(pairs), 100 * sum(p["chosen_score"] > p["rejected_score"] for p in pairs) / len(pairs))
        for name, pairs in kinds
    ]
    drawn = [
        ("Score, as PPO is paid", "", ["score"]),
        ("Distance from the fine-tuned model", "nats/answer", ["kl/answer"]),
        ("Length of answers", "tokens", ["length", "length_max"]),
        ("Explained variance of returns", "share", ["value/explained_variance"]),
    ]
    curves = [line_chart(title, "step", unit, series(found.ppo, keys)) for title, unit, keys in drawn]
    return section(
        "Learning from preferences",
        table(head, rows),
        charts(*curves),
        "<h3>Answers</h3>",
        table(("asked", "right", "fine-tuned", "after PPO"), _changed(found)),
        "<h3>Reward model</h3>",
        table(("held-out pairs", "number", "accuracy, %"), accuracies),
        charts(
            line_chart("Loss", "step", "nats/pair", series(found.reward, ["loss", "val/loss"])),
            reliability_chart(found.pairs),
        ),
        note=f"{len(found.before.lines)} held-out spoken questions, answered as PPO answers: drawn from the model's "
        "own distribution. Right is the file's answer word for word, which PPO does not see: it is paid by the "
        f"reward model. The difference of the two rows has a standard error of {summary['ppo_gain_standard_error']}.",
    )


def _changed(found: RewardResults) -> list[tuple[object, ...]]:
    """Questions whose answer became right or wrong, the first ones of the file."""
    rows = []
    for before, after in zip(found.before.lines, found.after.lines, strict=True):
        right = [normalise(one["answer"]) == normalise(one["reference"]) for one in (before, after)]
        if right[0] != right[1]:
            answers = (judged(one["reference"], one["answer"]) for one in (before, after))
            rows.append((found.questions[before["id"]], before["reference"], *answers))
    return rows[:_SHOWN_ANSWERS]


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std() / math.sqrt(len(values)))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
