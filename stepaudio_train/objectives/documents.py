"""What objectives ask of packed rows: sums over documents, where answers end, which documents are a pair.

An answer is what a document's loss weights pick out: those tokens whose targets they weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import PAIR, SIDE


def in_answers(batch: TokenBatch) -> Tensor:
    """[R, T] bool: tokens whose targets belong to an answer."""
    return batch.loss_weights != 0


def extra(batch: TokenBatch, name: str) -> Tensor:
    """[R, T]: `batch.extras[name]` within answers, 0 elsewhere, whatever stands there.

    Raises:
        ValueError: the batch has none.
    """
    if name not in batch.extras:
        raise ValueError(f"the objective needs extras[{name!r}], the batch has {sorted(batch.extras)}")
    values = batch.extras[name]
    return torch.where(in_answers(batch), values, torch.zeros_like(values))


def mean_metric(values: Tensor, weights: Tensor) -> Tensor:
    """[2] float32, detached: a metric's sum and weight."""
    return torch.stack([(values * weights).sum(), weights.sum().to(values.dtype)]).detach().float()


def per_document(values: Tensor, batch: TokenBatch) -> Tensor:
    """[R, T]: entry [r, d] is the sum of `values` [R, T] over document d of row r; 0 where there is none."""
    return torch.zeros_like(values).scatter_add(1, batch.documents.long(), values)


def largest_per_document(values: Tensor, batch: TokenBatch) -> Tensor:
    """[R, T]: entry [r, d] is the largest of `values` [R, T], which are 0 or more, in document d of row r."""
    return torch.zeros_like(values).scatter_reduce(1, batch.documents.long(), values, "amax")


def answer_ends(batch: TokenBatch) -> Tensor:
    """[R, T] bool: the last token of every document's answer."""
    places = torch.arange(1, batch.documents.shape[1] + 1, device=batch.documents.device) * in_answers(batch)
    last = largest_per_document(places, batch).gather(1, batch.documents.long())
    return (places == last) & in_answers(batch)


@dataclass(frozen=True)
class Pairs:
    """The preference pairs of a batch, P of them, in no particular order. Both documents of one lie in one row."""

    count: int
    _members: Tensor
    """[R, T] bool: all tokens of the pairs' answers."""
    _ends: Tensor
    """[R, T] bool: the last tokens of them."""
    _slots: Tensor
    """[members] int64: 2 * pair + side."""

    @classmethod
    def of(cls, batch: TokenBatch) -> Pairs:
        """Find them by the extras `pair` and `side`.

        Raises:
            ValueError: a pair that is not made of one chosen and one rejected document with an answer each.
        """
        pair, side = extra(batch, PAIR).long(), extra(batch, SIDE).long()
        members = in_answers(batch) & (pair >= 0)
        rows = members.nonzero()[:, 0]
        # Pairs are unique in their row alone; 2**31 keeps the numbers of two rows apart.
        keys, found = torch.unique(rows * 2**31 + pair[members], return_inverse=True)
        pairs = cls(len(keys), members, members & answer_ends(batch), 2 * found + side[members])
        answers = pairs.sums(pairs._ends.float())
        for index in (answers != 1).any(1).nonzero()[:1].flatten().tolist():
            row, number = divmod(int(keys[index]), 2**31)
            rejected, chosen = answers[index].int().tolist()
            raise ValueError(
                f"pair {number} of row {row} has {chosen} chosen and {rejected} rejected answers: must be one each"
            )
        return pairs

    @property
    def lengths(self) -> Tensor:
        """[P, 2] float32: tokens of the rejected and of the chosen answer of every pair."""
        return self.sums(self._members.float())

    def sums(self, values: Tensor) -> Tensor:
        """[P, 2]: sums of `values` [R, T] over the rejected and over the chosen answer of every pair."""
        totals = torch.zeros(2 * self.count, dtype=values.dtype, device=values.device)
        return totals.index_add(0, self._slots, values[self._members]).view(-1, 2)

    def at_ends(self, values: Tensor) -> Tensor:
        """[P, 2]: `values` [R, T] at the last token of the rejected and of the chosen answer of every pair."""
        return self.sums(torch.where(self._ends, values, torch.zeros_like(values)))
