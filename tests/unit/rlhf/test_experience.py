"""Answers in rows and out of them, what they are learned from, and the order of prompts."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stepaudio_train.config.policy_runs import GrpoRunConfig, PpoRunConfig
from stepaudio_train.config.rlhf import GaeConfig, GrpoConfig, PpoConfig
from stepaudio_train.data.extras import ADVANTAGES, OLD_LOG_PROBS, OLD_VALUES, REFERENCE_LOG_PROBS, RETURNS
from stepaudio_train.rlhf.experience import Experience, document_of, lay_out, own_share, rows_of, take_up
from stepaudio_train.rlhf.prompts import PromptOrder
from stepaudio_train.rlhf.signals import grpo_signals, ppo_signals
from stepaudio_train.rollout.rollouts import Rollout

LENGTH = 16


def experience(count: int = 7) -> Experience:
    random = np.random.default_rng(0)
    rollouts = [
        Rollout((1, 4), tuple(random.integers(5, 9, random.integers(1, 6)).tolist()), True) for _ in range(count)
    ]
    documents = [document_of(rollout, "tqta") for rollout in rollouts]
    extras = {
        name: [random.normal(size=len(document)).astype(np.float32) for document in documents]
        for name in (OLD_LOG_PROBS, OLD_VALUES, REFERENCE_LOG_PROBS)
    }
    return Experience(documents, extras)


def rows(found: Experience, multiple: int = 4) -> list[list[int]]:
    lengths = [len(document) for document in found.documents]
    return rows_of(lengths, range(len(lengths)), LENGTH, multiple)


def test_the_answer_teaches_with_what_ended_it():
    document = document_of(Rollout((1, 4, 9), (7, 3), True), "aqta")
    assert document.ids.tolist() == [1, 4, 9, 7, 3] and document.loss_weights.tolist() == [0, 0, 0, 1, 1]


def test_rows_hold_every_document_once_and_are_a_multiple():
    found = experience()
    laid = rows(found)
    assert len(laid) % 4 == 0 and sorted(index for row in laid for index in row) == list(range(7))
    filled = [row for row in laid if row]
    for replicas in (1, 2, 4):
        shares = [
            own_share(laid, SimpleNamespace(data_parallel_rank=r, data_parallel_size=replicas)) for r in range(replicas)
        ]
        assert [row for share in shares for row in share if row] == filled
        assert {len(share) for share in shares} == {len(laid) // replicas}
    prompts = [len(own_share(range(5), SimpleNamespace(data_parallel_rank=r, data_parallel_size=3))) for r in range(3)]
    assert sum(prompts) == 5 and min(prompts) >= 1


def test_what_is_laid_out_is_taken_up():
    found = experience()
    laid, values = rows(found), found.extras[OLD_VALUES]
    back = take_up(lay_out(values, laid, LENGTH), laid, [len(document) for document in found.documents])
    assert all(np.array_equal(back[index], values[index]) for index in range(7)) and len(back) == 7


def test_saved_answers_read_back_equal(tmp_path):
    found = experience()
    found.save(tmp_path / "kept.safetensors")
    back = Experience.load(tmp_path / "kept.safetensors")
    laid = rows(found)
    one, other = (each.batch(laid, LENGTH).named_tensors() for each in (found, back))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def signals_of(found: Experience, signals, totals: np.ndarray, config) -> dict[str, dict[int, np.ndarray]]:
    laid, lengths = rows(found), [len(document) for document in found.documents]

    def spread(values: np.ndarray) -> torch.Tensor:
        return lay_out([np.full(n, v, np.float32) for v, n in zip(values, lengths, strict=True)], laid, LENGTH)

    given = signals(found.batch(laid, LENGTH), totals, spread, config)
    return {name: take_up(values, laid, lengths) for name, values in given.items()}


@pytest.mark.parametrize("kl_as", ["reward", "loss"])
def test_ppo_learns_from_whitened_advantages_and_returns(kl_as):
    found, totals = experience(), np.arange(7.0)
    config = PpoRunConfig(loss=PpoConfig(kl_coefficient=0.5, kl_as=kl_as), gae=GaeConfig(gamma=1.0, gae_lambda=1.0))
    given = signals_of(found, ppo_signals, totals, config)
    for index, document in enumerate(found.documents):
        inside = slice(1, len(document) - 1)
        distances = (found.extras[OLD_LOG_PROBS][index] - found.extras[REFERENCE_LOG_PROBS][index])[inside]
        paid = -0.5 * distances if kl_as == "reward" else np.zeros_like(distances)
        paid[-1] += totals[index]
        # With gamma and lambda 1, a return is what is still to be paid.
        np.testing.assert_allclose(given[RETURNS][index][inside], paid[::-1].cumsum()[::-1], rtol=1e-4, atol=1e-5)
    advantages = np.concatenate([given[ADVANTAGES][i][1 : len(d) - 1] for i, d in enumerate(found.documents)])
    assert advantages.mean() == pytest.approx(0, abs=1e-5) and advantages.std() == pytest.approx(1, abs=1e-4)


def test_grpo_judges_answers_to_one_prompt_against_each_other():
    found = experience(6)
    config = GrpoRunConfig(loss=GrpoConfig(group_size=2, divide_by_std=False))
    given = signals_of(found, grpo_signals, np.array([1.0, 3.0, 5.0, 5.0, 0.0, -4.0]), config)[ADVANTAGES]
    assert [set(given[index].tolist()) for index in range(6)] == [{-1.0}, {1.0}, {0.0}, {0.0}, {2.0}, {-2.0}]


def test_every_prompt_is_answered_once_an_epoch():
    order = PromptOrder(num_prompts=7, per_iteration=3, seed=0)
    answered = [index for iteration in range(14) for index in order.of(iteration)]
    for epoch in range(6):
        assert sorted(answered[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert answered[:7] != answered[7:14] and order.of(5) == PromptOrder(7, 3, 0).of(5) != PromptOrder(7, 3, 1).of(5)
    assert (order.iterations(1), order.iterations(3), order.iterations(0.1)) == (3, 7, 1)
    assert Counter(PromptOrder(2, 6, 0).of(0)) == {0: 3, 1: 3}
