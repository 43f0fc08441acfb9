"""Rewards that need no model: pure functions of a prompt and what was answered to it.

The paper leaves rule-based rewards to future work (5.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepaudio_train.config.policy_runs import RewardSourceConfig, RuleName
from stepaudio_train.evaluation.word_errors import normalise, word_error_rate
from stepaudio_train.rlhf.prompts import Prompt


@dataclass(frozen=True)
class Said:
    """What was answered to a prompt."""

    text: str
    """What is written in it, as `rollout.speech_text.written_text` has it."""
    ended: bool
    """By `<|EOT|>`."""
    deaf: bool | None
    """Whether it says that the question was not heard; None where the prompt's condition is not known."""


Rule = Callable[[Prompt, Said], float]


def rules_of(config: RewardSourceConfig) -> dict[RuleName, Rule]:
    """The rules that `config.rules` names, in its order."""
    pattern, most = re.compile(config.pattern or ""), config.max_words or 0
    known: dict[RuleName, Rule] = {
        "exact": _exact,
        "word_accuracy": _word_accuracy,
        "pattern": lambda _, said: float(pattern.search(said.text) is not None),
        "length": lambda _, said: _length(said, most),
        "hearing": _hearing,
    }
    return {name: known[name] for name in config.rules}


def rule_problems(config: RewardSourceConfig, prompts: Sequence[Prompt]) -> list[str]:
    """A line for each rule that would say the same of any answer to these prompts."""
    problems = []
    needs_words = [name for name in ("exact", "word_accuracy") if name in config.rules]
    if needs_words and not any(normalise(prompt.reference) for prompt in prompts):
        problems += [
            f"reward.rules.{name}: no conversation of data ends with an answer in words" for name in needs_words
        ]
    if "hearing" in config.rules and all(prompt.condition is None for prompt in prompts):
        problems.append("reward.rules.hearing: no conversation of data has meta.condition (docs/deaf_hacking.md)")
    return problems


def _exact(prompt: Prompt, said: Said) -> float:
    """1 for the reference word for word; 0 for all answers where there is none."""
    reference = normalise(prompt.reference)
    return float(bool(reference) and normalise(said.text) == reference)


def _word_accuracy(prompt: Prompt, said: Said) -> float:
    """1 less the word errors of the reference, at least 0; 0 where there is none."""
    if not normalise(prompt.reference):
        return 0.0
    return max(0.0, 1 - word_error_rate([prompt.reference], [said.text]).percent / 100)


def _length(said: Said, most: int) -> float:
    """1 up to `most` words, then less the longer it is; 0 for an answer without words."""
    words = len(normalise(said.text).split())
    return min(1.0, most / words) if words else 0.0


def _hearing(prompt: Prompt, said: Said) -> float:
    """1 for answering a clear recording, and for saying of another one that it was not heard; else 0."""
    return 0.0 if prompt.condition is None else float(said.deaf == (prompt.condition != "clear"))
