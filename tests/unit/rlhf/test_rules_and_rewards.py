"""What answers are paid, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from stepaudio_train.config.policy_runs import RewardSourceConfig
from stepaudio_train.rlhf.prompts import Prompt
from stepaudio_train.rlhf.rewards import ScoreScale, rewards_of
from stepaudio_train.rlhf.rules import Said, rule_problems, rules_of

ASKED = Prompt("q", "aqta", (1, 2), "Seven, please.", None)
CLEAR, SILENT = (Prompt("q", "aqta", (1, 2), "", condition) for condition in ("clear", "silent"))


def said(text: str, ended: bool = True, deaf: bool | None = None) -> Said:
    return Said(text, ended, deaf)


@pytest.mark.parametrize(
    ("rule", "prompt", "answer", "paid"),
    [
        ("exact", ASKED, said("seven please"), 1),
        ("exact", ASKED, said("seven"), 0),
        ("exact", CLEAR, said(""), 0),
        ("word_accuracy", ASKED, said("seven"), 0.5),
        ("word_accuracy", ASKED, said("one two three four"), 0),
        ("word_accuracy", CLEAR, said("seven"), 0),
        ("pattern", ASKED, said("it is 7"), 1),
        ("pattern", ASKED, said("it is seven"), 0),
        ("length", ASKED, said("one two"), 1),
        ("length", ASKED, said("one two three four"), 0.75),
        ("length", ASKED, said(""), 0),
        ("hearing", CLEAR, said("", deaf=False), 1),
        ("hearing", CLEAR, said("", deaf=True), 0),
        ("hearing", SILENT, said("", deaf=True), 1),
        ("hearing", SILENT, said("", deaf=False), 0),
        ("hearing", ASKED, said(""), 0),
    ],
)
def test_each_rule_pays_for_what_it_says(rule, prompt, answer, paid):
    config = RewardSourceConfig(rules={rule: 1.0}, pattern=r"\d", max_words=3)
    assert rules_of(config)[rule](prompt, answer) == pytest.approx(paid)


def test_rules_that_would_say_the_same_of_any_answer_are_refused():
    config = RewardSourceConfig(rules={"exact": 1.0, "word_accuracy": 1.0, "hearing": 1.0, "pattern": 1.0})
    assert [problem.split(":")[0] for problem in rule_problems(config, [CLEAR])] == [
        "reward.rules.exact",
        "reward.rules.word_accuracy",
    ]
    assert [problem.split(":")[0] for problem in rule_problems(config, [ASKED])] == ["reward.rules.hearing"]
    assert rule_problems(config, [ASKED, CLEAR]) == []


def test_parts_add_up_by_weight_and_an_answer_without_an_end_pays():
    config = RewardSourceConfig(model_weight=2.0, rules={"exact": 0.5, "length": 0.0}, max_words=1, no_end_penalty=3.0)
    answers = [said("seven please"), said("no", ended=False)]
    rewards = rewards_of(config, [ASKED, ASKED], answers, np.array([5.0, 1.0]), ScoreScale(3.0, 4.0))
    assert rewards.totals.tolist() == [2 * 0.5 + 0.5, 2 * -0.5 - 3], "a weight of 0 measures without paying"
    assert {name: values.tolist() for name, values in rewards.parts.items()} == {
        "model": [5, 1],
        "exact": [1, 0],
        "length": [0.5, 1],
    }
    without = rewards_of(config, [ASKED, ASKED], answers, None, ScoreScale())
    assert without.totals.tolist() == [0.5, -3] and "model" not in without.parts


def test_the_scale_brings_the_first_scores_to_mean_0_and_deviation_1():
    scores = np.array([1.0, 2.0, 6.0])
    scale = ScoreScale.of(scores)
    scaled = (scores - scale.mean) / scale.std
    assert (scaled.mean(), scaled.std()) == (pytest.approx(0), pytest.approx(1))
    assert ScoreScale.of(np.full(4, 7.0)) == ScoreScale(7.0, 1.0), "equal scores say nothing, and nothing is divided"
