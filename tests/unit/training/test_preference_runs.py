"""Reward models and DPO on toy preferences: they learn, are measured right, and go on exactly."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import recipes.dpo as dpo
import recipes.reward as reward
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.rlhf import DpoConfig, RewardLossConfig
from stepaudio_train.config.schema import LoraConfig, RunConfig
from stepaudio_train.data.conversations import chat_renderer
from stepaudio_train.data.preferences import DocumentPair, load_preferences, pack_pairs
from stepaudio_train.data.sft_loader import SftLoader
from stepaudio_train.engines.build import build_engine
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import VALUE_HEAD
from stepaudio_train.testing.toy_preferences import (
    MODEL,
    TRAINING,
    VOCABULARY,
    toy_dpo_config,
    toy_reward_config,
    write_toy_preferences,
)
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.pair_outputs import pair_outputs
from stepaudio_train.training.preference_report import reliability
from stepaudio_train.training.weights import initialise

LOG_2 = math.log(2)


def lines_of(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model-00001.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_preferences(folder)
    return folder


@pytest.fixture(scope="module")
def reward_run(toy, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "reward"
    reward.main(toy_reward_config(toy, run))
    return run


@pytest.fixture(scope="module")
def dpo_run(toy, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "dpo"
    dpo.main(toy_dpo_config(toy, run, epochs=5.0))
    return run


@pytest.fixture
def no_report(monkeypatch) -> None:
    """Pages that nobody looks at take longer to draw than toy runs to learn."""
    for recipe in (reward, dpo):
        monkeypatch.setattr(recipe, "write_preference_report", lambda run_dir: run_dir)


@pytest.fixture(scope="module")
def held_out(toy, tmp_path_factory) -> list[DocumentPair]:
    config = toy_dpo_config(toy, toy)
    renderer = chat_renderer(
        replace(VOCABULARY, text_tokenizer=str(toy / "text.model")), Vocabulary.from_config(VOCABULARY)
    )
    return load_preferences(config.data, renderer, 128, tmp_path_factory.mktemp("codes"))["held_out"].pairs


def test_a_reward_model_tells_right_answers_that_it_has_not_seen_beside_these_wrong_ones(reward_run):
    first, last = lines_of(reward_run)[0], lines_of(reward_run)[-1]
    assert (first["loss"], first["accuracy"]) == (pytest.approx(LOG_2), 0.5), "a new value head says 0 of all"
    assert last["val/accuracy"] >= 0.9 and last["val/score/difference"] > 1
    assert 2 * last["val/accuracy"] == pytest.approx(last["val/accuracy/even"] + last["val/accuracy/odd"])


def test_what_is_measured_on_held_out_pairs_follows_from_their_scores(reward_run):
    last, pairs = lines_of(reward_run)[-1], lines_of(reward_run, "held_out_pairs.jsonl")
    differences = np.array([pair["chosen_score"] - pair["rejected_score"] for pair in pairs])
    assert len(pairs) == 18 and (np.diff(differences) >= 0).all(), "the most wrong one comes first"
    assert last["val/accuracy"] == pytest.approx((differences > 0).mean())
    assert last["val/score/difference"] == pytest.approx(differences.mean(), rel=1e-4)
    assert last["val/loss"] == pytest.approx(np.log1p(np.exp(-differences)).mean(), rel=1e-4)
    confidences = np.maximum(1 / (1 + np.exp(-differences)), 1 / (1 + np.exp(differences)))
    error = sum(
        abs((confidences - (differences > 0))[(confidences >= low) & (confidences < low + 0.05)].sum())
        for low in np.arange(0.5, 1, 0.05)
    )
    assert last["val/calibration_error"] == pytest.approx(error / 18, abs=1e-5)
    one = next(pair for pair in pairs if "\nnine<" in pair["prompt"])
    assert (one["chosen"], one["category"], one["margin"]) == ("zero<|EOT|>", "odd", 1.0)


def test_reliability_by_hand():
    def pair(probability: float) -> dict[str, float]:
        return {"chosen_score": math.log(probability / (1 - probability)), "rejected_score": 0.0}

    confidences, right = reliability([pair(0.91), pair(0.93), pair(0.08), pair(0.6), pair(0.5)])
    assert confidences == pytest.approx([0.5, 0.6, 0.92]) and right == pytest.approx([0.5, 1.0, 2 / 3])


def test_the_report_shows_curves_reliability_wrong_pairs_and_what_was_used(reward_run, dpo_run):
    page = (reward_run / "report.html").read_text(encoding="utf-8")
    for shown in ("Accuracy by category", "Reliability", "calibration_error", "nats/pair", "train.jsonl", "36 even"):
        assert shown in page, shown
    wrong = sum(p["chosen_score"] < p["rejected_score"] for p in lines_of(reward_run, "held_out_pairs.jsonl"))
    assert ("Most wrong" in page) == (wrong > 0)
    assert "Rewards" in (dpo_run / "report.html").read_text(encoding="utf-8")


def test_the_value_head_goes_on_to_the_next_stage(reward_run, toy):
    exported = weights_of(reward_run)
    assert exported["value_head.weight"].any()
    assert "| val/accuracy |" in (reward_run / "export" / "README.md").read_text(encoding="utf-8")
    for init in (reward_run, reward_run / "export"):
        config = RunConfig(model=replace(MODEL, value_head=True, init=str(init)), vocabulary=VOCABULARY)
        engine = build_engine(config)
        initialise(engine, config)
        weights = dict(engine.export_weights())
        assert all(torch.equal(weights[name], exported[name]) for name in VALUE_HEAD)


def test_margins_are_learned_where_they_count(toy, tmp_path, no_report):
    config = toy_reward_config(toy, tmp_path / "run", max_steps=1)
    reward.main(replace(config, loss=RewardLossConfig(margin_scale=2.0)))
    (line,) = lines_of(tmp_path / "run")
    # Equal scores cost log(1 + exp(margin)).
    margins = [2.0 * json.loads(text)["margin"] for text in (toy / "train.jsonl").read_text().splitlines()]
    low, high = (math.log1p(math.exp(margin)) for margin in (min(margins), max(margins)))
    assert low < line["loss"] < high


def answer_log_probs(weights: dict[str, torch.Tensor], pairs: list[DocumentPair]) -> np.ndarray:
    """[pairs, 2]: log-probabilities of the chosen and of the rejected answer, one by one, from the logits."""
    model = Step1ForCausalLM.of_weights(MODEL, weights)
    found = []
    for pair in pairs:
        for document in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(document.ids)[None].long()
            log_probs = F.log_softmax(model(ids, torch.zeros_like(ids).int())[0, :-1].double(), -1)
            of_targets = log_probs.gather(1, ids[0, 1:, None])[:, 0]
            found.append(float((of_targets * torch.from_numpy(document.loss_weights[1:])).sum()))
    return np.array(found).reshape(-1, 2)


@torch.no_grad()
def test_dpo_raises_the_chosen_answers_probability_over_the_rejected_ones(toy, dpo_run, held_out):
    before = answer_log_probs(load_file(toy / "weights" / "model-00001.safetensors"), held_out)
    after = answer_log_probs(weights_of(dpo_run), held_out)
    margins = 0.5 * ((after - before)[:, 0] - (after - before)[:, 1])
    last = lines_of(dpo_run)[-1]
    assert last["val/accuracy"] == (margins > 0).mean() >= 0.9
    assert last["val/reward/margin"] == pytest.approx(margins.mean(), rel=1e-3)
    # The first weights, drawn at random, prefer some answers by far.
    assert (before[:, 0] > before[:, 1]).mean() < 0.6 < 0.8 < (after[:, 0] > after[:, 1]).mean()
    assert lines_of(dpo_run)[0]["loss"] == pytest.approx(LOG_2, abs=1e-5), "the policy begins as its reference"


@torch.no_grad()
def test_the_reference_is_what_the_first_weights_say(toy, dpo_run, held_out):
    values = load_file(dpo_run / "reference" / "held_out" / "pairs.safetensors")["values"]
    sums = [
        part.sum()
        for pair, of_pair in zip(held_out, values.split([len(pair) for pair in held_out]), strict=True)
        for part in of_pair.split([len(pair.chosen), len(pair.rejected)])
    ]
    expected = answer_log_probs(load_file(toy / "weights" / "model-00001.safetensors"), held_out)
    np.testing.assert_allclose(np.array(sums).reshape(-1, 2), expected, rtol=1e-4)


def test_outputs_that_a_kill_left_are_not_computed_again(toy, tmp_path, held_out, monkeypatch):
    config = toy_dpo_config(toy, tmp_path)
    training, calls, outputs = replace(TRAINING, global_batch_rows=2, micro_batch_rows=1), [], LocalEngine.outputs
    engine = build_engine(config)
    initialise(engine, config)

    def counted(self, micro_batches, entropies=False):
        calls.append(len(micro_batches))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return outputs(self, micro_batches, entropies)

    def found_in(folder: str) -> list[np.ndarray]:
        return pair_outputs(engine, held_out, training, lambda o: o.log_probs, tmp_path / folder)

    monkeypatch.setattr(LocalEngine, "outputs", counted)
    with pytest.raises(KeyboardInterrupt):
        found_in("killed")
    found = found_in("killed")
    after_kill = len(calls) - 2
    assert all(map(np.array_equal, found_in("killed"), found)) and len(calls) == after_kill + 2
    assert all(map(np.array_equal, found_in("straight"), found))
    # The one batch before the kill was not computed again.
    assert len(calls) - 2 - after_kill == after_kill + 1 and set(calls) == {2}
    alone = [outputs(engine, [pack_pairs([[pair]], 128)])[0].log_probs[0, : len(pair)] for pair in held_out]
    np.testing.assert_allclose(np.concatenate(found), torch.cat(alone), atol=1e-4)


RECIPES = {"reward": (reward.main, toy_reward_config), "dpo": (dpo.main, toy_dpo_config)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_was_stopped_goes_on_exactly(toy, tmp_path, monkeypatch, no_report, name):
    main, config_of = RECIPES[name]
    short = {"epochs": 1.5, "eval_every": 4}
    main(config_of(toy, tmp_path / "straight", **short))
    original, drawn = SftLoader.next_batch, []

    def next_batch(self):
        drawn.append(1)
        if len(drawn) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(SftLoader, "next_batch", next_batch)
        main(config_of(toy, tmp_path / "run", **short))
    assert len(lines_of(tmp_path / "run")) == 5
    if name == "dpo":
        # Whatever became of the first weights: the reference is kept.
        (tmp_path / "run" / "reference" / "data" / "made_by.json").write_text(
            json.dumps({**read_made_by(tmp_path / "run"), "weights": "others"})
        )
    main(config_of(toy, tmp_path / "run", **short))
    learned = [
        [{k: v for k, v in line.items() if not k.startswith(("tokens_per_s", "elapsed", "mfu"))} for line in lines]
        for lines in (lines_of(tmp_path / "run"), lines_of(tmp_path / "straight"))
    ]
    assert learned[0] == learned[1] and same(weights_of(tmp_path / "run"), weights_of(tmp_path / "straight"))


def read_made_by(run: Path) -> dict:
    return json.loads((run / "reference" / "data" / "made_by.json").read_text())


def test_the_reference_is_tied_to_weights_and_pairs(toy, reward_run, tmp_path, no_report):
    config = toy_dpo_config(toy, tmp_path / "run", max_steps=1, export_hf=False)
    config = replace(config, vocabulary=replace(VOCABULARY, text_tokenizer=str(toy / "text.model")))
    dpo.main(config)
    first = read_made_by(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "checkpoints")
    # Not begun: other weights are another reference.
    dpo.main(replace(config, model=replace(config.model, init=str(reward_run))))
    other = read_made_by(tmp_path / "run")
    assert other["weights"] != first["weights"] and other["pairs"] == first["pairs"]
    assert lines_of(tmp_path / "run")[-1]["loss"] == pytest.approx(LOG_2, abs=1e-5)
    # Begun: a reference that is missing needs the weights it was begun with.
    held_out = tmp_path / "others.jsonl"
    held_out.write_text("".join((toy / "held_out.jsonl").read_text().splitlines(keepends=True)[:5]))
    changed = replace(config, data=replace(config.data, held_out=str(held_out)))
    with pytest.raises(ConfigError, match=r"model\.init=.*weights: is not what .* began with"):
        dpo.main(changed)
    dpo.main(replace(changed, model=replace(config.model, init=str(reward_run))))
    with pytest.raises(ConfigError, match="pairs are not those that"):
        (toy / "train.jsonl").rename(toy / "all.jsonl")
        (toy / "train.jsonl").write_text(held_out.read_text())
        try:
            dpo.main(config)
        finally:
            (toy / "all.jsonl").replace(toy / "train.jsonl")
    assert read_made_by(tmp_path / "run") == other


@pytest.mark.parametrize("form", ["simpo", "length_normalised"])
def test_other_forms_and_adapters(toy, tmp_path, no_report, form):
    config = toy_dpo_config(toy, tmp_path / "run", max_steps=1)
    lora = LoraConfig(rank=2) if form == "length_normalised" else None
    dpo.main(replace(config, loss=DpoConfig(form, beta=2.0), lora=lora))
    (line,) = lines_of(tmp_path / "run")
    assert (tmp_path / "run" / "reference").exists() == (form != "simpo")
    assert (line["loss"] == pytest.approx(LOG_2, abs=1e-5)) == (form != "simpo")
    assert line["val/accuracy"] > 0.5
