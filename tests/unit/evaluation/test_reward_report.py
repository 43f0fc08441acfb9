"""The quick start's figures of reward model and PPO, from made-up results of their parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepaudio_train.data.pair_lines import pair_to_json
from stepaudio_train.data.prompts import question_record
from stepaudio_train.data.records import AudioPart, Message, TextPart
from stepaudio_train.evaluation.reward_report import RewardResults, reward_section


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def text(words: str) -> Message:
    return Message("assistant", (TextPart(words),))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four questions: before, one answer is right; after, three."""
    right = ["five", "<six>", "two", "one"]
    prompts = [question_record(f"q{n}", AudioPart(f"{n}.wav", text=f"question {n}")) for n in range(4)]
    pairs = [pair_to_json(prompt, text(word), text("nine")) for prompt, word in zip(prompts, right, strict=True)]
    write(tmp_path / "preferences" / "held_out_preferences.jsonl", *pairs)
    for name, answers in (("before", ["five", "four", "four", "four"]), ("after", ["Five.", "<six>", "two", "ten"])):
        lines = [
            {"id": f"q{n}", "reference": r, "answer": a} for n, (r, a) in enumerate(zip(right, answers, strict=True))
        ]
        write(tmp_path / "preferences" / name / "answers.jsonl", *lines)
        write(tmp_path / "preferences" / name / "answers.json", {"scores_exchanged_audio": {"aqta": {"exact": 12.5}}})
    scored = [("near miss", 1.0, 0.5), ("near miss", 0.0, 2.0), ("other answer", 3.0, 1.0), ("other answer", 1.0, 0.0)]
    lines = [{"category": c, "chosen_score": a, "rejected_score": b} for c, a, b in scored]
    write(tmp_path / "reward" / "held_out_pairs.jsonl", *lines)
    write(tmp_path / "reward" / "metrics.jsonl", *({"step": n, "loss": 0.7 / n, "val/loss": 0.7} for n in (1, 2, 3)))
    ppo = {"score": 0.1, "kl/answer": 0.2, "length": 3.0, "length_max": 9.0, "value/explained_variance": 0.4}
    write(tmp_path / "ppo" / "metrics.jsonl", *({"step": n, **ppo} for n in (1, 2, 3)))
    return tmp_path


def test_the_score_is_the_share_of_right_answers(run):
    summary = RewardResults.read(run).summary()
    assert summary["reward_accuracy"] == 75
    assert (summary["ppo_score_before"], summary["ppo_score_after"]) == (25, 75)
    assert summary["ppo_score_after_shuffled_audio"] == 12.5
    # Of 0, 1, 1, 0 the standard deviation is 0.5.
    assert summary["ppo_gain_standard_error"] == 25


def test_the_section_shows_what_changed(run):
    shown = reward_section(RewardResults.read(run))
    assert "question 1" in shown and "question 2" in shown
    # The first was right and the last was wrong before and after.
    assert "question 0" not in shown and "question 3" not in shown
    assert "&lt;six&gt;" in shown and "<six>" not in shown
    assert "near miss" in shown and shown.count("<svg") == 6 and "standard error of 25" in shown


def test_a_missing_part_is_an_error(run):
    (run / "preferences" / "after" / "answers.jsonl").unlink()
    with pytest.raises(OSError, match="answers.jsonl"):
        RewardResults.read(run)
