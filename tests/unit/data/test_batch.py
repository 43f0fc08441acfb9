"""The packed batch: what goes with it through splitting, joining and moving."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepaudio_train.data.batch import TokenBatch


def make_batch(rows: int, length: int = 5) -> TokenBatch:
    ids = torch.arange(rows * length).view(rows, length)
    return TokenBatch(ids, ids + 1, ids / 7, ids.int() * 0, ids.to(torch.int8))


def assert_same(a: TokenBatch, b: TokenBatch) -> None:
    assert a.named_tensors().keys() == b.named_tensors().keys()
    assert all(torch.equal(tensor, b.named_tensors()[name]) for name, tensor in a.named_tensors().items())


def test_extras_are_split_and_joined_with_their_tokens():
    batch = make_batch(5)
    batch = replace(batch, extras={"old_log_probs": -batch.loss_weights, "ids": batch.input_ids.clone()})
    parts = batch.split(2)
    assert [part.num_rows for part in parts] == [2, 2, 1]
    for part in parts:
        assert torch.equal(part.extras["ids"], part.input_ids)
        assert torch.equal(part.extras["old_log_probs"], -part.loss_weights)
    assert_same(TokenBatch.concatenate(parts), batch)
    moved = batch.to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.named_tensors().values())
    assert list(moved.named_tensors())[-2:] == ["extras.old_log_probs", "extras.ids"]


def test_without_extras_there_are_none():
    assert make_batch(4).split(3)[1].extras == {}
    assert TokenBatch.concatenate(make_batch(4).split(1)).extras == {}


def test_batches_of_other_extras_are_not_joined():
    batch = make_batch(2)
    with pytest.raises(ValueError, match=r"\[\['returns'\], \[\]\]"):
        TokenBatch.concatenate([replace(batch, extras={"returns": batch.loss_weights}), batch])
