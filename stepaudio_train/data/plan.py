"""Which record goes where: splits by a hash of the id, and the joined and sped-up records of the training split."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Protocol

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.records import Record

TRAIN, VALIDATION, TEST, HELDOUT_SPEAKER = "train", "validation", "test", "heldout_speaker"


class SplitOptions(Protocol):
    """The options of `stepaudio prepare` that decide on splits."""

    @property
    def test_percent(self) -> int: ...
    @property
    def validation_percent(self) -> int: ...
    @property
    def heldout_speaker(self) -> str | None: ...
    @property
    def join_max(self) -> int: ...
    @property
    def speed_copies(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Item:
    """A record to write: one record as it is, or several recordings joined; at some speed."""

    id: str
    records: tuple[Record, ...]
    speed: float = 1.0
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def is_original(self) -> bool:
        return len(self.records) == 1 and self.speed == 1.0


def make_plan(records: list[Record], options: SplitOptions) -> dict[str, list[Item]]:
    """Split -> items, in the order in which they are written. Depends on the ids alone, not on the order of `records`.

    The order within a split is random (by hash), so that a shard is a fair sample of its split.

    Raises:
        UserError: no recording is by the speaker to hold out.
    """
    splits: dict[str, list[Record]] = {TRAIN: [], VALIDATION: [], TEST: []}
    heldout = []
    for record in sorted(records, key=lambda r: _hash("order", r.id)):
        if options.heldout_speaker is not None and _speaker(record) == options.heldout_speaker:
            heldout.append(record)
            continue
        percentile = _hash("split", record.id) % 100
        if percentile < options.test_percent:
            splits[TEST].append(record)
        elif percentile < options.test_percent + options.validation_percent:
            splits[VALIDATION].append(record)
        else:
            splits[TRAIN].append(record)
    if options.heldout_speaker is not None:
        if not heldout:
            known = sorted({s for r in records if (s := _speaker(r)) is not None})
            raise UserError(
                f"no recording is by speaker {options.heldout_speaker!r}; known speakers: {', '.join(known) or 'none'}"
            )
        splits[HELDOUT_SPEAKER] = heldout
    plan = {name: [Item(r.id, (r,)) for r in members] for name, members in splits.items()}
    training = plan[TRAIN] + _joined(splits[TRAIN], options.join_max)
    training += [
        Item(f"{item.id}@{speed:g}", item.records, speed, item.meta | {"speed": speed, "original": item.id})
        for speed in options.speed_copies
        for item in training
    ]
    plan[TRAIN] = sorted(training, key=lambda item: _hash("order", item.id))
    return plan


def _joined(records: list[Record], join_max: int) -> list[Item]:
    """For every n from 2 to join_max, each recording in one group of n by the same speaker, in random order."""
    by_speaker: dict[str | None, list[Record]] = defaultdict(list)
    for record in records:
        if len(record.audio_parts()) == 1 and sum(len(m.content) for m in record.messages) == 1:
            by_speaker[_speaker(record)].append(record)
    items = []
    for n in range(2, join_max + 1):
        for own in by_speaker.values():
            mixed = sorted(own, key=lambda r: _hash(f"join {n}", r.id))
            for start in range(0, len(mixed) - n + 1, n):
                group = tuple(mixed[start : start + n])
                pieces = [r.id for r in group]
                items.append(Item(f"joined-{n}-{_hash('', '|'.join(pieces)):016x}", group, meta={"pieces": pieces}))
    return items


def _speaker(record: Record) -> str | None:
    return next((part.speaker for part in record.audio_parts() if part.speaker), None)


def _hash(purpose: str, text: str) -> int:
    """64 bits that are the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(f"{purpose}|{text}".encode()).digest()[:8], "big")
