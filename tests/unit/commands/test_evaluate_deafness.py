"""`stepaudio evaluate deafness` on a toy policy, which says a word again or the one behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import recipes.sft as sft
from stepaudio_train.commands.evaluate_deafness import DeafnessOptions, deafness_summary, evaluate_deafness
from stepaudio_train.config.errors import UserError
from stepaudio_train.evaluation.deafness import PhraseClassifier
from stepaudio_train.testing.toy_rewards import ASKED, toy_guessing_config, write_toy_rewards

CONDITIONS = ("clear", "noisy", "clear", "silent")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A run with three checkpoints, and a question in some condition for every word."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy_rewards(folder)
    config = toy_guessing_config(folder, folder / "run")
    # An exported model has as many audio ids as the paper's.
    vocabulary = replace(config.vocabulary, linguistic_size=1024, semantic_size=4096)
    vocabulary = replace(vocabulary, text_tokenizer=str(folder / "text.model"))
    size = vocabulary.text_size + 1024 + 4096 + vocabulary.reserved_size
    config = replace(config, vocabulary=vocabulary, model=replace(config.model, init=None, vocab_size=size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepaudio_train.training.loop.write_run_report", lambda run_dir: run_dir)
        sft.main(replace(config, training=replace(config.training, checkpoint_every=30, keep_checkpoints=9)))
    lines = (json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines())
    asked = [
        {**line, "id": word, "meta": {"condition": condition}}
        for line, word, condition in zip(lines, ASKED, CONDITIONS, strict=True)
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    return folder


@pytest.fixture(autouse=True)
def deaf_is_to_say_it_again(monkeypatch):
    """One, four and six are said again or answered; the toy does not know the phrases."""
    monkeypatch.setattr(PhraseClassifier, "is_deaf", lambda self, answer: answer in ("one", "four"))


def measured(toy: Path, output: str, **options) -> list:
    given = {"temperature": 0.0, "max_new_tokens": 12, "device": "cpu", **options}
    return evaluate_deafness(DeafnessOptions(toy / "run", toy / "asked.jsonl", toy / output, **given))


def test_every_checkpoint_is_measured_and_the_exported_weights_last(toy):
    found = measured(toy, "all", checkpoints=True)
    assert [one.step for one in found] == [30, 60, 80]
    answers = [json.loads(line) for line in (toy / "all" / "answers.jsonl").read_text().splitlines()]
    assert [(line["id"], line["condition"]) for line in answers] == list(zip(ASKED, CONDITIONS, strict=True))
    # What is told is told of the answers that are written, which are those of the last weights.
    deaf = {c: [line["answer"] in ("one", "four") for line in answers if line["condition"] == c] for c in CONDITIONS}
    assert found[-1].rates.deaf_rate_clear == 100 * sum(deaf["clear"]) / 2
    assert found[-1].rates.deaf_rate_unclear == 100 * sum(deaf["noisy"] + deaf["silent"]) / 2
    right = [line["answer"] == line["reference"] for line in answers if line["condition"] == "clear"]
    assert found[-1].right_clear == 100 * sum(right) / 2
    written = json.loads((toy / "all" / "deafness.json").read_text())
    assert written == [one.line() for one in found]
    # The weights of earlier checkpoints leave no trace.
    assert measured(toy, "last") == found[-1:]
    assert "step 80" in deafness_summary(found)


def test_early_weights_are_not_the_last_ones(toy, monkeypatch):
    """With the trained model's prompts, a checkpoint of an early step answers by its own weights."""
    early, last = measured(toy, "one"), []
    monkeypatch.setattr(
        "stepaudio_train.commands.evaluate_deafness._take_over", lambda model, source: last.append(source)
    )
    measured(toy, "two", checkpoints=True)
    assert [source.path.parent.name for source in last] == ["step_00000030", "step_00000060", "run"]
    assert early[0].step == 80


def test_conditions_can_be_chosen_and_none_is_an_error(toy):
    (only,) = measured(toy, "clear", conditions=["clear"])
    assert only.rates.deaf_rate_unclear is None and set(only.rates.counts) == {"clear"}
    assert " -" in deafness_summary([only])
    with pytest.raises(UserError, match="meta.condition cut .none is refused"):
        measured(toy, "cut", conditions=["cut"])


def test_a_run_that_has_not_ended_is_refused(toy, tmp_path):
    (tmp_path / "config.yaml").write_text((toy / "run" / "config.yaml").read_text())
    with pytest.raises(UserError, match="holds no export/"):
        evaluate_deafness(DeafnessOptions(tmp_path, toy / "asked.jsonl", tmp_path / "out"))
