"""Packing: rows that are as full as they can be, nothing cut, nothing lost, and tensors that keep the contract."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from stepaudio_train.data.packing import Document, choose_row, choose_rows, pack_rows


def document(n: int, first: int = 10, task: int = 3) -> Document:
    weights = np.ones(n, np.float32)
    weights[1] = 0
    return Document(np.arange(first, first + n, dtype=np.int32), weights, task)


def test_the_best_filling_is_found_exactly():
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = random.integers(1, 40, 9).tolist()
        capacity = int(random.integers(40, 90))
        chosen = choose_row(lengths, capacity)
        sets = [others for n in range(len(lengths)) for others in combinations(lengths[1:], n)]
        totals = [lengths[0] + sum(others) for others in sets]
        assert sum(lengths[i] for i in chosen) == max(t for t in totals if t <= capacity)
        assert chosen == sorted(set(chosen)) and chosen[0] == 0


def test_rows_are_full_on_speech_lengths():
    """Utterances of 0.4 to 4 s and long recordings, at 41.7 tokens a second: at least 99% of a row is used."""
    random = np.random.default_rng(0)
    cases = {
        256: np.clip(random.lognormal(np.log(1.3), 0.4, 4000), 0.4, 4) * 41.7 + 12,
        8192: np.clip(random.lognormal(np.log(12), 0.9, 4000), 0.5, 190) * 41.7 + 8,
    }
    for capacity, drawn in cases.items():
        source = iter(drawn.astype(int).tolist())
        waiting = [next(source) for _ in range(512)]
        filled = []
        for _ in range(300):
            row = choose_row(waiting, capacity)
            filled.append(sum(waiting[i] for i in row))
            waiting = [n for i, n in enumerate(waiting) if i not in row] + [next(source) for _ in row]
        assert np.mean(filled) / capacity >= 0.99


def test_a_finite_set_is_packed_without_loss():
    lengths = np.random.default_rng(1).integers(5, 60, 100).tolist()
    rows = choose_rows(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(100))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)


def test_tensors_of_a_row():
    batch = pack_rows([[document(3, 10, 3), document(4, 20, 4)], [document(2, 30, 0)]], 8)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 22, 23, 0], [30, 31, 0, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[11, 12, 0, 21, 22, 23, 0, 0], [31, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.loss_weights.tolist() == [[0, 1, 0, 0, 1, 1, 0, 0], [0] * 8]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch.tasks[0, :7].tolist() == [3, 3, 3, 4, 4, 4, 4]
    kinds = [t.dtype for t in batch.named_tensors().values()]
    assert kinds == [torch.int64, torch.int64, torch.float32, torch.int32, torch.int8]


def test_nothing_is_cut():
    with pytest.raises(ValueError, match="9 tokens in a row of 8"):
        pack_rows([[document(5), document(4)]], 8)
