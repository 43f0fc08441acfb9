"""Packing fill and speed beside the usual ways, and how evenly rows are dealt to data-parallel ranks.

    .venv/bin/python benchmarks/packing.py [--sequence-length 8192] [--documents 50000] [--json FILE]

Lengths are made up: speech of 1 to 30 s and of up to 190 s at 41.7 tokens a second, and speech and text half and half.
Documents longer than a row are left out. Documents a second are of processor time.
`Excess` is how much more the rank with most to compute has than the mean: over a step, and summed over the rows after
each of which ranks meet (ZeRO-3). It comes of modelled FLOPs; no step is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from reporting import parser, report

from stepaudio_train.config.compose import load_config
from stepaudio_train.config.schema import PretrainConfig, Step1Config
from stepaudio_train.data.balance import deal_rows
from stepaudio_train.data.packing import choose_row
from stepaudio_train.training.throughput import training_flops

Rows = list[list[int]]
"""The lengths of each row's documents."""

_TOKENS_PER_S = 41.7
_BATCH_ROWS = 512


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sequence-length", type=int, default=8192, help="tokens of a row")
    options.add_argument("--documents", type=int, default=50_000, help="of each kind, at most")
    chosen = options.parse_args()
    capacity = chosen.sequence_length
    packing, balance = [], []
    for kind, lengths in _lengths(chosen.documents).items():
        lengths = lengths[lengths <= capacity]
        for way, pack in _ways().items():
            rows, seconds = _timed(pack, lengths.tolist(), capacity)
            fill = 100 * sum(map(sum, rows)) / (capacity * len(rows))
            packing.append({"lengths": kind, "way": way, "fill %": fill, "documents/s": sum(map(len, rows)) / seconds})
        # The last way's rows are dealt out.
        balance += [line for model in ("step1_3b", "step1_130b") for line in _dealt(kind, model, rows, capacity)]
    report(f"Packing, rows of {capacity} tokens", packing, chosen.json)
    second = chosen.json and chosen.json.with_name(f"{chosen.json.stem}_ranks{chosen.json.suffix}")
    report(f"Global batches of {_BATCH_ROWS} rows over data-parallel ranks", balance, second)


def _lengths(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def speech(number: int, median_s: float, spread: float, longest_s: float) -> np.ndarray:
        drawn = np.clip(random.lognormal(np.log(median_s), spread, number), 1.0, longest_s)
        return (drawn * _TOKENS_PER_S).astype(int) + 8

    text = np.clip(random.lognormal(np.log(450), 1.25, count // 2), 16, 40_000).astype(int)
    return {
        "speech, 1 to 30 s": speech(count, 6.0, 0.7, 30.0),
        "speech, to 190 s": speech(count, 12.0, 0.9, 190.0),
        "speech and text": random.permutation(np.concatenate([speech(count // 2, 12.0, 0.9, 190.0), text])),
    }


def _ways() -> dict[str, Callable[[Sequence[int], int], Rows]]:
    return {
        "as they come": _as_they_come,
        "first fit decreasing, 4,096": _first_fit_decreasing,
        "this project's, 512 waiting": partial(_one_row_at_a_time, waiting=512),
        "this project's, 4,096 waiting": partial(_one_row_at_a_time, waiting=4096),
    }


def _timed(pack: Callable[[Sequence[int], int], Rows], lengths: Sequence[int], capacity: int) -> tuple[Rows, float]:
    """Rows, and processor seconds."""
    start = time.process_time()
    rows = pack(lengths, capacity)
    return rows, time.process_time() - start


def _as_they_come(lengths: Sequence[int], capacity: int) -> Rows:
    rows: Rows = [[]]
    room = capacity
    for length in lengths:
        if length > room:
            rows.append([])
            room = capacity
        rows[-1].append(length)
        room -= length
    return rows


def _first_fit_decreasing(lengths: Sequence[int], capacity: int) -> Rows:
    """As loaders do that pack a buffer as a whole, the rows searched one by one."""
    rows: Rows = []
    for start in range(0, len(lengths), 4096):
        rooms, own = np.zeros(0, np.int64), []
        for length in sorted(lengths[start : start + 4096], reverse=True):
            first = int((rooms >= length).argmax()) if len(rooms) else 0
            if not len(rooms) or rooms[first] < length:
                rooms, first = np.append(rooms, capacity), len(own)
                own.append([])
            own[first].append(length)
            rooms[first] -= length
        rows += own
    return rows


def _one_row_at_a_time(lengths: Sequence[int], capacity: int, waiting: int) -> Rows:
    """This project's way, as a stream: rows as long as enough documents wait."""
    present, upcoming, rows = list(lengths[:waiting]), iter(lengths[waiting:]), []
    while len(present) == waiting:
        chosen = choose_row(present, capacity)
        rows.append([present[place] for place in chosen])
        for place in reversed(chosen):
            del present[place]
        present += islice(upcoming, len(chosen))
    return rows


def _dealt(kind: str, name: str, rows: Rows, capacity: int) -> list[dict[str, Any]]:
    """What dealing by cost changes for a model, at 32, 8 and 4 rows a rank."""
    model: Step1Config = load_config("pretrain", PretrainConfig, [f"model={name}"]).model
    costs = np.array([training_flops(model, capacity, sum(n * n for n in row)) for row in rows])
    costs = costs[: len(costs) // _BATCH_ROWS * _BATCH_ROWS].reshape(-1, _BATCH_ROWS)
    lines = []
    for ranks in (16, 64, 128):
        found: dict[str, list[float]] = {"before": [], "dealt": [], "meet before": [], "meet dealt": []}
        for batch in costs:
            before, after = batch.reshape(ranks, -1), batch[deal_rows(batch, ranks)]
            for suffix, dealt in (("before", before), ("dealt", after)):
                found[suffix].append(dealt.sum(1).max() / dealt.sum(1).mean())
                found[f"meet {suffix}"].append(dealt.max(0).sum() / dealt.mean(0).sum())
        lines.append(
            {
                "lengths": kind,
                "model": name,
                "ranks": ranks,
                "excess %": _excess(found["before"]),
                "dealt": _excess(found["dealt"]),
                "meeting, excess %": _excess(found["meet before"]),
                "meeting, dealt": _excess(found["meet dealt"]),
            }
        )
    return lines


def _excess(ratios: Sequence[float]) -> float | None:
    return 100 * (float(np.mean(ratios)) - 1) if ratios else None


if __name__ == "__main__":
    main()
