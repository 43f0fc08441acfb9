"""Reference and reward model on ranks of their own: answers go there, and what they are worth comes back.

Policy's and judges' ranks are two worlds (`engines/process_group.py`), each with its own process groups. What passes
between them goes through the store that all ranks see: an iteration's answers and a few numbers a token.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.numpy import load, save

from stepaudio_train.config.policy_runs import PolicyRunConfig
from stepaudio_train.data.packing import Document
from stepaudio_train.engines.base import Judge
from stepaudio_train.engines.process_group import World, parted
from stepaudio_train.rlhf.experience import Experience, PerToken, measured, row_multiple, rows_of
from stepaudio_train.rlhf.models import Judges, judging

log = logging.getLogger(__name__)

_PATIENCE = timedelta(days=7)
"""Between two iterations of the policy. Ranks that have died are noticed by who launched them."""
_FAREWELL = timedelta(minutes=2)


class JudgesApart:
    """The policy's side: asks, and goes on until it needs the answer."""

    def __init__(self, world: World, engine: Judge) -> None:
        self._store, self._engine, self._numbers = world.store, engine, count()
        self._ends = [_ended(rank) for rank in range(world.num_apart)]

    def ask(self, documents: Sequence[Document]) -> Callable[[], dict[str, PerToken]]:
        """Send an iteration's answers. Every rank of the policy calls it.

        Returns:
            Waits for what the judges say of every token, the same on every rank, by the names that `Judges.measure`
            gives.
        """
        number = next(self._numbers)
        if self._engine.is_main:
            _send(self._store, _asked(number), Experience(list(documents), {}).tensors())
            # Every rank has read an answer before it takes part in the next iteration but one.
            for key in (_asked(number - 2), _told(number - 2)) if number > 1 else ():
                self._store.delete_key(key)
        ends = np.cumsum([len(document) for document in documents])[:-1]

        def told() -> dict[str, PerToken]:
            found = _receive(self._store, _told(number))
            return {name: np.split(values, ends) for name, values in found.items()}

        return told

    def close(self) -> None:
        """Let the judges go. Every rank calls it, after an error too."""
        if not self._engine.is_main:
            return
        _send(self._store, _asked(next(self._numbers)), {})
        try:
            # The store may live in this process.
            self._store.wait(self._ends, _FAREWELL)
        except dist.DistStoreError:
            log.warning("the ranks of reference and reward model did not leave within %s", _FAREWELL)


@contextmanager
def judges_apart(world: World | None, engine: Judge) -> Iterator[JudgesApart | None]:
    """The judges of the other world, where there is one, until the policy leaves."""
    if world is None:
        yield None
        return
    judges = JudgesApart(world, engine)
    try:
        yield judges
    finally:
        judges.close()


def with_judges(config: PolicyRunConfig, learn: Callable[[World | None], None]) -> None:
    """Learn on the policy's ranks, and judge on the last `config.judge_ranks`. Every launched rank calls it.

    Args:
        learn: of the policy's world; None where all ranks hold all models.
    """
    with parted(config.judge_ranks) as world:
        if world is not None and world.is_apart:
            _serve(config, world)
        else:
            learn(world)


def _serve(config: PolicyRunConfig, world: World) -> None:
    """Be one of the ranks that hold the judges, until the policy leaves. Every one of them calls it."""
    # A signal to stop is for the policy, which ends its step with the judges' help and then lets them go.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with judging(config) as judges:
            engine = judges.reward or judges.reference
            assert engine is not None  # or the configuration is refused
            rank = engine.rank
            for number in count():
                asked = _receive(world.store, _asked(number))
                if not asked:
                    break
                documents = Experience.from_tensors(asked).documents
                found = _judged(documents, config, engine, judges)
                if engine.is_main:
                    told = {name: np.concatenate(values) for name, values in found.items()}
                    _send(world.store, _told(number), told)
        _send(world.store, _ended(rank), {})
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)


def _judged(
    documents: Sequence[Document], config: PolicyRunConfig, engine: Judge, judges: Judges
) -> dict[str, PerToken]:
    length, micro = config.training.sequence_length, config.training.micro_batch_rows
    lengths = [len(document) for document in documents]
    rows = rows_of(lengths, range(len(documents)), length, row_multiple(config, engine))
    return measured(documents, rows, length, engine, lambda batch: judges.measure(batch.split(micro)))


def _asked(number: int) -> str:
    return f"asked/{number}"


def _told(number: int) -> str:
    return f"told/{number}"


def _ended(rank: int) -> str:
    return f"ended/{rank}"


def _send(store: dist.Store, key: str, tensors: Mapping[str, NDArray[Any]]) -> None:
    store.set(key, save(dict(tensors)))


def _receive(store: dist.Store, key: str) -> dict[str, NDArray[Any]]:
    store.wait([key], _PATIENCE)
    return load(store.get(key))
