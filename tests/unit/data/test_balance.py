"""Rows dealt to ranks: all of them, equally many, at equal cost as far as whole rows can be."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from stepaudio_train.config.compose import load_config
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.data.balance import deal_rows
from stepaudio_train.data.packing import choose_rows
from stepaudio_train.training.throughput import training_flops

LENGTH = 8192


def speech(random: np.random.Generator, count: int) -> np.ndarray:
    """Utterances of 1 to 30 s at 41.7 tokens a second."""
    return (np.clip(random.lognormal(np.log(6), 0.7, count), 1, 30) * 41.7).astype(int) + 8


def speech_and_text(random: np.random.Generator, count: int) -> np.ndarray:
    """Recordings of up to 190 s, and texts, half and half; without those longer than a row."""
    spoken = (np.clip(random.lognormal(np.log(12), 0.9, count // 2), 0.5, 190) * 41.7).astype(int) + 8
    written = np.clip(random.lognormal(np.log(450), 1.25, count // 2), 16, 40_000).astype(int)
    lengths = random.permutation(np.concatenate([spoken, written]))
    return lengths[lengths <= LENGTH]


@cache
def packed(lengths: Callable[[np.random.Generator, int], np.ndarray]) -> list[int]:
    """Sums of squared lengths of the rows that 28,000 documents fill."""
    drawn = lengths(np.random.default_rng(1), 28_000)
    return [int(np.square(drawn[row]).sum()) for row in choose_rows(drawn.tolist(), LENGTH)]


def row_costs(model: str, lengths: Callable[[np.random.Generator, int], np.ndarray]) -> np.ndarray:
    """FLOPs of the rows that documents of such lengths fill."""
    config = load_config("pretrain", PretrainConfig, [f"model={model}"]).model
    return np.array([training_flops(config, LENGTH, square) for square in packed(lengths)])


def imbalance(costs: np.ndarray) -> float:
    """Of [ranks, rows] costs: the most expensive rank over the mean."""
    totals = costs.sum(1)
    return float(totals.max() / totals.mean())


@pytest.mark.parametrize("ranks", [1, 2, 5, 10, 40])
def test_every_row_is_dealt_once_and_the_most_expensive_first(ranks):
    random = np.random.default_rng(ranks)
    for costs in (random.lognormal(0, 1, 40), np.ones(40), np.zeros(40), random.integers(1, 4, 40).astype(float)):
        dealt = deal_rows(costs, ranks)
        assert dealt.shape == (ranks, 40 // ranks)
        assert sorted(dealt.ravel().tolist()) == list(range(40))
        assert (np.diff(costs[dealt], axis=1) <= 0).all()
        assert np.array_equal(dealt, deal_rows(costs.copy(), ranks))


def test_few_rows_are_dealt_about_as_well_as_can_be():
    """Against all ways to give 2 ranks 4 of 8 rows each."""
    random = np.random.default_rng(0)
    excess = []
    for _ in range(50):
        costs = random.uniform(1, 2, 8)
        best = min(max(half, costs.sum() - half) for half in (costs[list(c)].sum() for c in combinations(range(8), 4)))
        excess.append(costs[deal_rows(costs, 2)].sum(1).max() / best)
    assert min(excess) >= 1 - 1e-9 and max(excess) < 1.06 and np.mean(excess) < 1.01


@pytest.mark.parametrize("lengths", [speech, speech_and_text])
@pytest.mark.parametrize("model", ["step1_3b", "step1_130b"])
def test_no_rank_has_a_hundredth_more_than_the_mean(model, lengths):
    """Global batches of 512 rows, at 8 rows a rank and more."""
    costs = row_costs(model, lengths)
    assert len(costs) > 1024
    for ranks in (8, 16, 64):
        before, after = [], []
        for start in range(0, len(costs) - 511, 512):
            batch = costs[start : start + 512]
            before.append(imbalance(batch.reshape(ranks, -1)))
            after.append(imbalance(batch[deal_rows(batch, ranks)]))
        assert max(after) <= 1.01
        assert all(a < b for a, b in zip(after, before, strict=True))


def test_ranks_meet_in_time_after_every_row_too():
    costs = row_costs("step1_3b", speech_and_text)[:512]
    dealt = costs[deal_rows(costs, 16)]
    assert dealt.max(0).sum() / dealt.mean(0).sum() < 1.01
    as_they_come = costs.reshape(16, -1)
    assert as_they_come.max(0).sum() / as_they_come.mean(0).sum() > 1.05


def test_uneven_shares_are_refused():
    with pytest.raises(ValueError, match="6 rows for 4 data-parallel ranks"):
        deal_rows(np.ones(6), 4)
