"""Made-up data: same batches at any data-parallel size, exact resume, single documents equal packed ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import DataConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.loader import build_train_loader, build_validation_batches
from stepaudio_train.data.synthetic import documents_per_row
from stepaudio_train.tokenizers.vocabulary import Modality, Special, Vocabulary

VOCABULARY = Vocabulary(512, reserved_size=128)


def assert_same(a: TokenBatch, b: TokenBatch) -> None:
    others = b.named_tensors()
    for name, tensor in a.named_tensors().items():
        assert torch.equal(tensor, others[name]), name


def documents_of(batch: TokenBatch) -> list[tuple[list[int], list[float]]]:
    found = []
    for r in range(batch.num_rows):
        for d in range(int(batch.documents[r].max()) + 1):
            here = batch.documents[r] == d
            if batch.loss_weights[r][here].any():
                found.append((batch.input_ids[r][here].tolist(), batch.loss_weights[r][here].tolist()))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_global_batch_is_the_same_at_any_data_parallel_size(size):
    whole = build_train_loader(DataConfig(), VOCABULARY, 256, 8, seed=3)
    parts = [build_train_loader(DataConfig(), VOCABULARY, 256, 8, 3, rank, size) for rank in range(size)]
    for _ in range(3):
        assert_same(whole.next_batch(), TokenBatch.concatenate([p.next_batch() for p in parts]))


def test_save_and_load_continue_bit_for_bit(tmp_path):
    loader = build_train_loader(DataConfig(), VOCABULARY, 64, 4, seed=0)
    loader.next_batch()
    loader.save(tmp_path)
    expected = loader.next_batch()
    other = build_train_loader(DataConfig(), VOCABULARY, 64, 4, seed=0)
    other.load(tmp_path)
    assert_same(other.next_batch(), expected)
    with pytest.raises(ConfigError, match="seed"):
        build_train_loader(DataConfig(), VOCABULARY, 64, 4, seed=1).load(tmp_path)


@pytest.mark.parametrize("length", [32, 64, 256])
def test_single_rows_hold_the_packed_documents_in_order(length):
    count = documents_per_row(length)
    packed = build_train_loader(DataConfig(), VOCABULARY, length, 4, seed=1)
    single = build_train_loader(
        replace(DataConfig(), synthetic_documents="single"), VOCABULARY, length, 4 * count, seed=1
    )
    for _ in range(2):
        batch = packed.next_batch()
        assert len(documents_of(batch)) == 4 * count
        assert documents_of(batch) == documents_of(single.next_batch())


def test_batches_keep_the_contract():
    batch = build_train_loader(DataConfig(), VOCABULARY, 256, 8, seed=0).next_batch()
    assert batch.input_ids.dtype == torch.int64 and batch.documents.dtype == torch.int32
    assert batch.tasks.dtype == torch.int8 and batch.loss_weights.dtype == torch.float32
    assert batch.input_ids.shape == (8, 256) and int(batch.input_ids.max()) < VOCABULARY.total_size
    assert (batch.documents.diff(dim=1) >= 0).all()
    same = batch.documents[:, 1:] == batch.documents[:, :-1]
    learnt = batch.loss_weights[:, :-1] > 0
    assert (learnt <= same).all(), "a target must be in the token's own document"
    assert torch.equal(batch.targets[:, :-1][learnt], batch.input_ids[:, 1:][learnt])
    assert learnt.float().mean() > 0.9


def test_audio_is_two_linguistic_and_three_semantic():
    batch = build_train_loader(DataConfig(), VOCABULARY, 256, 8, seed=0).next_batch()
    seen = 0
    for ids, _ in documents_of(batch):
        if Special.AUDIO_START not in ids:
            continue
        audio = ids[ids.index(Special.AUDIO_START) + 1 : ids.index(Special.AUDIO_END)]
        pattern = VOCABULARY.modality(torch.tensor(audio)).view(-1, 5)
        expected = [Modality.LINGUISTIC] * 2 + [Modality.SEMANTIC] * 3
        assert (pattern == torch.tensor(expected)).all()
        seen += 1
    assert seen > 5


def test_validation_is_fixed_and_not_the_training_data():
    first, second = (build_validation_batches(DataConfig(), VOCABULARY, 64, 4, 3, seed=0) for _ in range(2))
    assert len(first) == 3
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    train = build_train_loader(DataConfig(), VOCABULARY, 64, 4, seed=0).next_batch()
    assert not np.array_equal(first[0].input_ids.numpy(), train.input_ids.numpy())


def test_everything_that_does_not_fit_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        build_train_loader(DataConfig(), Vocabulary(70), 8, 3, seed=0, data_parallel_size=2)
    assert len(caught.value.problems) == 3
