"""What the deaf-hacking experiment tells of what its parts have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepaudio_train.evaluation.deaf_hacking_report import (
    DeafHackingResults,
    RewardModel,
    write_deaf_hacking_report,
)


def measure(step: int, clear: float, unclear: float, right: float) -> dict[str, Any]:
    return {"step": step, "deaf_rate_clear": clear, "deaf_rate_unclear": unclear, "counts": {}, "right_clear": right}


def pair(category: str, chosen: float, rejected: float) -> str:
    return json.dumps({"category": category, "chosen_score": chosen, "rejected_score": rejected}) + "\n"


def write(run: Path, hacked: float, cured: float) -> DeafHackingResults:
    curves = {
        "sft": [measure(90, 4.0, 99.0, 85.0)],
        "hacked": [measure(10, 30.0, 99.0, 60.0), measure(20, hacked, 100.0, 3.0)],
        "cured": [measure(10, 2.0, 98.0, 88.0), measure(20, cured, 97.0, 90.0)],
    }
    for policy, curve in curves.items():
        folder = run / policy / "heard"
        folder.mkdir(parents=True)
        (folder / "deafness.json").write_text(json.dumps(curve))
        lines = [
            {"condition": "noisy", "reference": "Sorry?", "answer": "Sorry?"},
            {"condition": "clear", "reference": "seven", "answer": f"<{policy}>"},
        ]
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"biased": (1.0, 2.0), "cured": (2.0, 1.0)}
    for name, (right, deaf) in scores.items():
        (run / f"reward_{name}").mkdir()
        pairs = pair("clear", 1, 2) + pair("clear", 2, 1) + 2 * pair("noisy", 3, 0) + pair("deaf_on_clear", right, deaf)
        (run / f"reward_{name}" / "held_out_pairs.jsonl").write_text(pairs)
    (run / "hearing" / "train").mkdir(parents=True)
    (run / "hearing" / "train" / "mined.jsonl.report.json").write_text(json.dumps({"mined": 37}))
    return DeafHackingResults.read(run, {"sft": 90.0, "hacked": 30.0})


def test_the_summary_has_the_last_measure_of_each_policy(tmp_path):
    summary = write(tmp_path, hacked=96.0, cured=1.0).summary()
    expected = {
        "deaf_rate_clear_before": 4.0,
        "deaf_rate_clear_hacked": 96.0,
        "deaf_rate_clear_cured": 1.0,
        "deaf_rate_unclear_cured": 97.0,
        "right_clear_hacked": 3.0,
        # The probes are no pairs as people give them.
        "reward_accuracy_biased": 75.0,
        "reward_prefers_deaf_biased": 100.0,
        "reward_prefers_deaf_cured": 0.0,
        "mined": 37,
        "minutes": {"sft": 1.5, "hacked": 0.5, "all": 2.0},
        "hack_appeared": True,
        "cure_worked": True,
    }
    assert {name: summary[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("hacked", "cured", "said"),
    [(96.0, 1.0, "the hack appeared; cured"), (20.0, 1.0, "NO hack appeared"), (96.0, 6.0, "NOT cured")],
)
def test_the_verdict_does_not_say_what_was_not_found(tmp_path, hacked, cured, said):
    results = write(tmp_path, hacked, cured)
    assert said in results.verdict() and "with 37 mined" in results.verdict()
    assert f"4.0% -> {hacked}% -> {cured}%" in results.verdict()


def test_the_report_shows_curves_bars_and_answers(tmp_path):
    path = write_deaf_hacking_report(write(tmp_path, hacked=96.0, cured=1.0))
    content = path.read_text(encoding="utf-8")
    # Three lines over steps and three sets of bars.
    assert content.count("<svg") == 6
    for part in ("Deaf to clear questions", "&lt;hacked&gt;", "&lt;cured&gt;", "prefers deaf answers"):
        assert part in content
    # Of answers to unclear questions there is none.
    assert "Sorry?" not in content


def test_a_file_of_pairs_without_probes_is_no_measure_of_deafness(tmp_path):
    file = tmp_path / "held_out_pairs.jsonl"
    file.write_text(pair("clear", 2, 1))
    with pytest.raises(KeyError, match="deaf_on_clear"):
        RewardModel.read(file)
    file.write_text(pair("deaf_on_clear", 2, 1))
    with pytest.raises(KeyError, match="no pairs but"):
        RewardModel.read(file)
