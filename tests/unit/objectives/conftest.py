"""Made-up answers and pairs of answers, and rows packed of them."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import (
    ADVANTAGES,
    CATEGORY,
    MARGIN,
    OLD_LOG_PROBS,
    OLD_VALUES,
    PAIR,
    REFERENCE_LOG_PROBS,
    RETURNS,
    SIDE,
)
from stepaudio_train.objectives.base import TokenOutputs

Document = dict[str, Tensor]
"""Name -> [n] of `weights`, of the fields of TokenOutputs, and of the extras."""
_OUTPUTS = ("weights", "log_probs", "entropies", "values")
_PADDING = {PAIR: -1.0, SIDE: 0.0}


def _pack(rows: Sequence[Sequence[Document]], length: int) -> tuple[TokenOutputs, TokenBatch]:
    """Rows as data.packing lays them; extras of padding are no numbers, since nothing may read them."""
    first = next(document for row in rows for document in row)
    names = [name for name in first if name not in _OUTPUTS]
    tensors = {
        name: torch.full((len(rows), length), _PADDING.get(name, math.nan if name in names else 0.0)).double()
        for name in first
    }
    documents = torch.zeros(len(rows), length, dtype=torch.int32)
    for r, row in enumerate(rows):
        start = 0
        for index, document in enumerate(row):
            end = start + len(document["weights"])
            assert end <= length
            documents[r, start:end] = index
            for name, values in document.items():
                tensors[name][r, start:end] = values
            start = end
        documents[r, start:] = len(row)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    batch = TokenBatch(
        ids, ids, tensors["weights"].float(), documents, ids.to(torch.int8), {name: tensors[name] for name in names}
    )
    return TokenOutputs(*(tensors[name] for name in _OUTPUTS[1:])), batch


def _answer(generator: torch.Generator) -> Document:
    """A question of some tokens and its answer, which is in two parts now and then, as around a tool's output."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    parts = [(0, draw(0, 3)), (1, draw(1, 6))]
    if draw(0, 3) == 0:
        parts += [(0, draw(1, 3)), (1, draw(1, 4))]
    weights = torch.tensor([weight for weight, n in [*parts, (0, 1)] for _ in range(n)]).double()

    def numbers(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(len(weights), generator=generator, dtype=torch.float64)

    log_probs = -numbers().abs() - 0.1
    document = {
        "weights": weights,
        "log_probs": log_probs * weights,
        "entropies": numbers().abs() * weights,
        "values": numbers(),
        OLD_LOG_PROBS: log_probs + numbers(0.3),
        REFERENCE_LOG_PROBS: log_probs + numbers(0.5),
        ADVANTAGES: numbers(),
        RETURNS: numbers(),
        OLD_VALUES: numbers(),
    }
    inside = weights != 0
    return {name: v if name in _OUTPUTS else v.where(inside, math.nan * v) for name, v in document.items()}


@pytest.fixture
def pack() -> Callable[[Sequence[Sequence[Document]], int], tuple[TokenOutputs, TokenBatch]]:
    return _pack


@pytest.fixture
def answers() -> Callable[[int], list[Document]]:
    """A number of documents, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return lambda count: [_answer(generator) for _ in range(count)]


@pytest.fixture
def pairs(answers: Callable[[int], list[Document]]) -> Callable[[int], list[tuple[Document, Document]]]:
    """A number of (chosen, rejected), of 3 categories, always the same ones. Every third pair has the same number."""

    def made(count: int) -> list[tuple[Document, Document]]:
        documents = answers(2 * count)
        for index, document in enumerate(documents):
            pair = index // 2
            own = {PAIR: 7 + pair % 3, SIDE: 1 - index % 2, CATEGORY: pair % 3, MARGIN: 0.5 * (pair % 4)}
            document.update({name: torch.full_like(document["weights"], value) for name, value in own.items()})
        return list(zip(documents[::2], documents[1::2], strict=True))

    return made
