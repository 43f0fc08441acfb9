"""Turns, ratios and memory that runs out: what the tables of `stepaudio bench` are made of."""

import weakref

import pytest
import torch

from stepaudio_train.commands.bench.cases import BenchOptions, build_case, products_flops, rows_of, speech_row
from stepaudio_train.commands.bench.timing import Contender, Timing, time_in_turns

CPU = torch.device("cpu")


def recorded(name: str, calls: list[str]) -> Contender:
    return Contender(name, lambda: calls.append(f"build {name}") or (lambda: calls.append(name)))


def test_contenders_take_turns_or_run_apart():
    calls: list[str] = []
    contenders = [recorded("a", calls), recorded("b", calls)]
    together = time_in_turns(contenders, rounds=1, device=CPU, apart=False)
    assert calls == ["build a", "build b", *"ab" * 3]
    assert all(len(timing.wall_s) == 1 for timing in together)
    calls.clear()
    time_in_turns(contenders, rounds=1, device=CPU, apart=True)
    assert calls == ["build a", *"aaa", "build b", *"bbb"]


class Large:
    """Something that holds itself, as models do, and can be timed."""

    def __init__(self) -> None:
        self.itself = self

    def __call__(self) -> None:
        pass


def test_what_runs_apart_is_freed_before_the_next_is_built():
    built: list[weakref.ref] = []

    def build() -> Large:
        assert all(other() is None for other in built)
        built.append(weakref.ref(large := Large()))
        return large

    time_in_turns([Contender(name, build) for name in "abc"], rounds=1, device=CPU, apart=True)
    assert len(built) == 3


def test_a_contender_that_does_not_fit_has_no_figures_and_stops_nobody():
    def too_large():
        raise torch.OutOfMemoryError

    contenders = [Contender("a", lambda: lambda: None), Contender("b", too_large), Contender("c", lambda: too_large)]
    timings = time_in_turns(contenders, rounds=2, device=CPU, apart=False)
    assert [len(timing.wall_s) for timing in timings] == [2, 0, 0]
    rows = rows_of(contenders, timings, [1.0, 1.0, 1.0])
    assert rows[1]["ms"] is None and rows[1]["times ours"] is None and rows[0]["of the products"] is None


def test_ratios_are_those_of_the_same_round():
    ours, other = Timing((1.0, 10.0, 2.0), (1.0, 1.0, 1.0)), Timing((3.0, 30.0, 2.0), (2.0, 2.0, 2.0))
    contenders = [Contender("ours", lambda: lambda: None), Contender("other", lambda: lambda: None)]
    first, second = rows_of(contenders, [ours, other], [4e9, 6e9])
    assert first["times ours"] == 1.0 and second["times ours"] == 3.0
    assert first["ms"] == 2000.0 and first["GFLOP/s"] == 2.0 and second["processor ms"] == 2000.0
    assert first["of the products"] == pytest.approx(2.0 / 2.0)


def test_the_case_is_a_full_row_of_speech():
    case = build_case(BenchOptions(device="cpu", precision="fp32"))
    assert case.num_tokens >= 0.99 * 2048 and len(case.documents) > 4
    assert case.squared_lengths == sum(len(document) ** 2 for document in case.documents)
    assert int(case.batch.documents.max()) in (len(case.documents) - 1, len(case.documents))
    assert [len(d) for d in speech_row(2048, 5760)] == [len(d) for d in case.documents]


def test_flops_of_products():
    assert products_flops([(2, 3, 4), (1, 1, 1)]) == 50.0
