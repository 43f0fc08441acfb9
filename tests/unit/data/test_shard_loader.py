"""Batches from token shards: order independent of DP, exact resume, blends by tokens, tolerance for damage."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import BlendEntry, DataConfig
from stepaudio_train.data.batch import TASKS, TokenBatch
from stepaudio_train.data.loader import build_train_loader, build_validation_batches
from stepaudio_train.testing.token_data import make_speech, write_token_dataset

T, ROWS = 512, 8


def same(a: TokenBatch, b: TokenBatch) -> bool:
    tensors, others = a.named_tensors(), b.named_tensors()
    return list(tensors) == list(others) and all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.fixture(scope="module")
def config(speech_folder, text_folder) -> DataConfig:
    blend = {
        "asr": BlendEntry("asr", str(speech_folder), 2.0, "target"),
        "tts": BlendEntry("tts", str(speech_folder), 1.0),
        "mixed": BlendEntry("interleaved", str(speech_folder), 1.0),
        "text": BlendEntry("text", str(text_folder), 1.0),
        "pictures": BlendEntry("image", "nowhere", 0.0),
    }
    return DataConfig("shards", blend, packing_buffer_samples=32)


@pytest.fixture
def build(config, renderer, text_tokenizer_file):
    def make(rank: int = 0, size: int = 1, seed: int = 0, rows: int = ROWS, config=config, length: int = T):
        return build_train_loader(config, renderer.vocabulary, length, rows, seed, rank, size, text_tokenizer_file)

    return make


def documents_of(batch: TokenBatch) -> list[tuple[int, tuple[int, ...]]]:
    """(task, ids) of every document that is no padding."""
    found = []
    for r in range(batch.num_rows):
        for d in range(int(batch.documents[r].max()) + 1):
            here = batch.documents[r] == d
            ids = tuple(batch.input_ids[r][here].tolist())
            if ids[0] == 1:
                found.append((int(batch.tasks[r][here][0]), ids))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_global_batches_are_the_same_at_any_data_parallel_size(build, size):
    whole = build()
    parts = [build(rank, size) for rank in range(size)]
    for _ in range(3):
        assert same(whole.next_batch(), TokenBatch.concatenate([p.next_batch() for p in parts]))


def test_the_seed_decides(build):
    assert same(build().next_batch(), build().next_batch())
    assert not same(build().next_batch(), build(seed=1).next_batch())


@pytest.mark.parametrize("after", [0, 7])
def test_resume_bit_for_bit_at_another_data_parallel_size(build, tmp_path, after):
    parts = [build(rank, 2) for rank in range(2)]
    for _ in range(after):
        for part in parts:
            part.next_batch()
    for part in parts:
        part.save(tmp_path)
    expected = [TokenBatch.concatenate([p.next_batch() for p in parts]) for _ in range(6)]
    whole = build()
    whole.next_batch()
    whole.load(tmp_path)
    assert all(same(e, whole.next_batch()) for e in expected)


def test_loading_in_processes_resumes_too(build, config, tmp_path):
    config = replace(config, num_workers=1, num_streams=1)
    loader = build(config=config)
    for _ in range(3):
        loader.next_batch()
    loader.save(tmp_path)
    expected = [loader.next_batch() for _ in range(3)]
    loader.close()
    again = build(config=config)
    again.load(tmp_path)
    assert all(same(e, again.next_batch()) for e in expected)
    again.close()


def test_a_checkpoint_of_other_data_is_refused_by_key(build, config, tmp_path):
    build().save(tmp_path)
    with pytest.raises(ConfigError) as caught:
        build(seed=1, length=256).load(tmp_path)
    assert [p.split(":")[0] for p in caught.value.problems] == ["training.seed", "training.sequence_length"]
    with pytest.raises(ConfigError, match="num_streams"):
        build(config=replace(config, num_streams=8)).load(tmp_path)


def test_rows_are_full_and_documents_whole(build):
    loader = build()
    batch = TokenBatch.concatenate([loader.next_batch() for _ in range(20)])
    documents = documents_of(batch)
    assert sum(len(ids) for _, ids in documents) / batch.input_ids.numel() >= 0.99
    assert all(ids[0] == 1 and ids[-1] == 2 for _, ids in documents)
    asr = batch.tasks == TASKS.index("asr")
    assert 0 < batch.loss_weights[asr].mean() < 0.3, "only the transcript teaches where the blend says so"
    assert batch.loss_weights[batch.tasks == TASKS.index("tts")].mean() > 0.9


def test_blend_is_by_tokens(build, config, speech_folder, text_folder):
    """Documents of the two entries differ in length; their tokens come out as asked."""
    blend = {
        "speech": BlendEntry("interleaved", str(speech_folder), 3.0),
        "text": BlendEntry("text", str(text_folder), 2.0),
    }
    loader = build(config=replace(config, blend=blend))
    tokens = torch.zeros(len(TASKS))
    for _ in range(100):
        batch = loader.next_batch()
        real = batch.input_ids != 0
        tokens += torch.bincount(batch.tasks[real].long(), minlength=len(TASKS))
    share = (tokens[TASKS.index("text")] / tokens.sum()).item()
    assert share == pytest.approx(0.4, rel=0.005)


def test_every_sample_is_seen_once_an_epoch(build, config, speech_folder):
    blend = {"a": BlendEntry("continuation", str(speech_folder))}
    loader = build(config=replace(config, blend=blend), rows=4)
    seen: dict[tuple[int, ...], int] = {}
    while sum(seen.values()) < 800:
        for _, ids in documents_of(loader.next_batch()):
            seen[ids] = seen.get(ids, 0) + 1
    assert len(seen) == 400
    assert max(seen.values()) <= 4


def test_damage_is_named_and_the_rest_goes_on(
    build, config, speech_folder, renderer, text_tokenizer_file, tmp_path, caplog
):
    folder = tmp_path / "damaged"
    shutil.copytree(speech_folder, folder)
    shard = folder / "shard-000002.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    other = folder / "shard-000003.tar"
    content = bytearray(other.read_bytes())
    content[600:640] = b"x" * 40  # inside the first record's JSON
    other.write_bytes(bytes(content))
    loader = build(config=replace(config, blend={"a": BlendEntry("asr", str(folder))}))
    with caplog.at_level(logging.WARNING):
        seen = {ids for _ in range(60) for _, ids in documents_of(loader.next_batch())}
    assert "shard-000002.tar" in caplog.text and "cut off" in caplog.text
    assert "shard-000003.tar" in caplog.text
    assert loader.num_skipped["damaged"] > 0
    assert 350 <= len(seen) < 400


def test_documents_longer_than_a_row_are_counted_and_named(
    build, config, renderer, text_tokenizer_file, tmp_path, caplog
):
    random = np.random.default_rng(5)
    samples = [make_speech(random, f"x{i}") for i in range(40)] + [make_speech(random, "long", mean_words=40)]
    folder = write_token_dataset(tmp_path / "data", samples, renderer, text_tokenizer_file)
    loader = build(config=replace(config, blend={"a": BlendEntry("asr", str(folder))}))
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            loader.next_batch()
    assert loader.num_skipped["too long"] > 0
    assert "long-" in caplog.text and "training.sequence_length=512" in caplog.text


def test_nothing_usable_ends_with_a_reason(build, config, speech_folder, tmp_path):
    folder = tmp_path / "empty"
    shutil.copytree(speech_folder, folder)
    for shard in folder.glob("*.tar"):
        shard.write_bytes(b"")
    loader = build(config=replace(config, blend={"a": BlendEntry("asr", str(folder))}))
    with pytest.raises(ValueError, match="no usable sample"):
        loader.next_batch()


def _problems(config: DataConfig, build, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(config=config, **kwargs)
    return caught.value.problems


def test_all_problems_at_once(build, config, speech_folder, tmp_path):
    blend = {
        "pictures": BlendEntry("image", "nowhere", 1.0),
        "absent": BlendEntry("asr", str(tmp_path / "absent")),
        "negative": BlendEntry("asr", str(speech_folder), -1.0),
    }
    problems = "\n".join(_problems(replace(config, blend=blend), build, rows=6, size=3))
    for expected in (
        "data.num_streams=4",
        "training.global_batch_rows=6",
        "data.blend.pictures: image data is not supported yet; type data.blend.pictures.weight=0",
        "data.blend.absent.path",
        "data.blend.negative.weight=-1.0",
    ):
        assert expected in problems


def test_rows_too_short_for_everything(build, config, text_folder):
    blend = {"text": BlendEntry("text", str(text_folder))}
    assert "training.sequence_length=4" in _problems(replace(config, blend=blend), build, length=4)[0]


def test_task_that_no_sample_has(build, config, text_folder):
    blend = {"text": BlendEntry("asr", str(text_folder))}
    assert "no sample" in _problems(replace(config, blend=blend), build)[0]


def test_another_text_tokenizer_is_refused(config, renderer, text_tokenizer_file, tmp_path):
    from stepaudio_train.tokenizers.text import train_text_tokenizer

    other = tmp_path / "other.model"
    train_text_tokenizer(["something else entirely"], 400, other)
    with pytest.raises(ConfigError, match="another text tokenizer"):
        build_train_loader(config, renderer.vocabulary, T, ROWS, 0, text_tokenizer=other)
    with pytest.raises(ConfigError, match=r"vocabulary\.text_tokenizer: needed"):
        build_train_loader(config, renderer.vocabulary, T, ROWS, 0)


def test_a_missing_shard_is_told_before_training(build, config, speech_folder, tmp_path):
    folder = tmp_path / "gap"
    shutil.copytree(speech_folder, folder)
    (folder / "shard-000001.tar").unlink()
    problems = _problems(replace(config, blend={"a": BlendEntry("asr", str(folder))}), build)
    assert "shard-000001.tar missing" in problems[0]


def test_validation_is_finite_fixed_and_the_same_at_any_data_parallel_size(config, renderer, text_tokenizer_file: Path):
    def batches(num: int, rank: int = 0, size: int = 1) -> list[TokenBatch]:
        return build_validation_batches(
            config, renderer.vocabulary, T, ROWS, num, 0, rank, size, text_tokenizer=text_tokenizer_file
        )

    whole = batches(4)
    assert len(whole) == 4 and all(b.num_rows == ROWS for b in whole)
    assert all(same(a, b) for a, b in zip(whole, batches(4), strict=True))
    parts = [batches(4, rank, 2) for rank in range(2)]
    assert all(same(w, TokenBatch.concatenate(list(p))) for w, p in zip(whole, zip(*parts, strict=True), strict=True))
    documents = [d for b in whole for d in documents_of(b)]
    assert {TASKS[task] for task, _ in documents} == {"asr", "tts", "interleaved", "text"}
    everything = batches(1000)
    assert 4 < len(everything) < 1000
    assert everything[-1].num_rows == ROWS
    found = [d for b in everything for d in documents_of(b)]
    assert len(found) == len(set(found)), "no document twice"
