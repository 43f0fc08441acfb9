"""Packing: rows that are as full as they can be, nothing cut, nothing lost, and tensors that keep the contract."""

from __future__ import annotations

from itertools import combinations, islice

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


def short(random: np.random.Generator, count: int) -> np.ndarray:
    """Utterances of 0.4 to 4 s, at 41.7 tokens a second."""
    return np.clip(random.lognormal(np.log(1.3), 0.4, count), 0.4, 4) * 41.7 + 12


def speech(random: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(random.lognormal(np.log(6), 0.7, count), 1, 30) * 41.7 + 8


def recordings(random: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(random.lognormal(np.log(12), 0.9, count), 0.5, 190) * 41.7 + 8


def speech_and_text(random: np.random.Generator, count: int) -> np.ndarray:
    text = np.clip(random.lognormal(np.log(450), 1.25, count // 2), 16, 40_000)
    return random.permutation(np.concatenate([recordings(random, count // 2), text]))


def stream(lengths: list[int], capacity: int, waiting: int) -> tuple[list[list[int]], list[int]]:
    """Rows made while `waiting` documents wait, as indices into `lengths`; and those that still wait at the end."""
    upcoming = iter(range(len(lengths)))
    present = list(islice(upcoming, waiting))
    rows = []
    while len(present) == waiting:
        row = choose_row([lengths[i] for i in present], capacity)
        rows.append([present[place] for place in row])
        for place in reversed(row):
            del present[place]
        present += islice(upcoming, len(row))
    return rows, present


@pytest.mark.parametrize("waiting", [512, 4096])
@pytest.mark.parametrize(
    ("drawn", "capacity", "least_fill"),
    [
        (short, 256, 0.99),
        *((drawn, n, 0.998) for drawn in (speech, recordings, speech_and_text) for n in (4096, 32768)),
    ],
)
def test_a_stream_fills_its_rows(drawn, capacity, least_fill, waiting):
    lengths = drawn(np.random.default_rng(0), 6000).astype(int)
    lengths = lengths[lengths <= capacity]
    rows, left = stream(lengths.tolist(), capacity, waiting)
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled) <= capacity and np.mean(filled) >= least_fill * capacity
    assert sorted([i for row in rows for i in row] + left) == list(range(len(lengths))), "every document once"


def test_rows_stay_mixed():
    """Batches of neighbouring rows are no more alike inside than rows drawn at random."""
    lengths = speech_and_text(np.random.default_rng(2), 12_000).astype(int)
    lengths = lengths[lengths <= 4096]
    rows, _ = stream(lengths.tolist(), 4096, 512)
    squares = np.array([np.square(lengths[row]).sum() for row in rows], float)
    batches = squares[: len(squares) // 8 * 8].reshape(-1, 8).mean(1)
    assert batches.std() < 1.5 * squares.std() / np.sqrt(8)


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
