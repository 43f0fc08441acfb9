"""Shards: what Megatron-Energon and plain tar read is what was written; cuts and gaps are told by name."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from megatron.energon import TextSample, WorkerConfig, get_train_dataset
from megatron.energon.task_encoder import Cooker, DefaultTaskEncoder, basic_sample_keys, stateless

from stepaudio_train.data.shard_reader import ShardReader
from stepaudio_train.data.shards import (
    ShardError,
    ShardSample,
    finish_dataset,
    list_shards,
    read_shard,
    sample_key,
    shard_counts,
    shard_name,
    write_shard,
)

CUT_BYTES = 9000


def content(i: int) -> bytes:
    return json.dumps(list(range(i * 100))).encode()


def samples(start: int, count: int) -> list[ShardSample]:
    numbers = range(start, start + count)
    return [ShardSample(f"k{i}", {"json": content(i), "0.txt": f"text {i}".encode()}) for i in numbers]


def readers(folder: Path) -> tuple[ShardReader, list[tuple[str, str]]]:
    damage: list[tuple[str, str]] = []
    shards = list(zip(list_shards(folder), (5, 7), strict=True))
    return ShardReader(shards, lambda *told: damage.append(told)), damage


@pytest.fixture
def folder(tmp_path):
    counts = {}
    for number, (start, count) in enumerate([(0, 5), (5, 7)]):
        counts[shard_name(number)] = write_shard(tmp_path / shard_name(number), samples(start, count))
    finish_dataset(tmp_path, counts)
    return tmp_path


def test_round_trip(folder):
    assert shard_counts(folder) == {"shard-000000.tar": 5, "shard-000001.tar": 7}
    assert [s for path in list_shards(folder) for s in read_shard(path)] == samples(0, 12)


def test_random_access(folder):
    damage = []
    reader = ShardReader(
        [(p, n) for p, n in zip(list_shards(folder), (5, 7), strict=True)], lambda *a: damage.append(a)
    )
    assert len(reader) == 12
    for index in (11, 0, 4, 5, 7):
        found = reader[index]
        assert found["__key__"] == f"k{index}" and found["0.txt"] == f"text {index}".encode()
        assert found["json"] == content(index)
    assert not damage


def test_random_access_past_a_cut(folder):
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:CUT_BYTES])
    damage = []
    reader = ShardReader(
        [(p, n) for p, n in zip(list_shards(folder), (5, 7), strict=True)], lambda *a: damage.append(a)
    )
    read = [reader[i] is not None for i in range(12)]
    assert read == [True] * 7 + [False] * 5
    assert damage[0] == (f"{path}: sample 2", "the file is cut off")


@stateless
def cook(crude: dict) -> TextSample:
    return TextSample(**basic_sample_keys(crude), text=crude["0.txt"])


class _Encoder(DefaultTaskEncoder):
    cookers = (Cooker(cook),)


def test_energon_reads_the_folder_as_it_is(folder):
    dataset = get_train_dataset(
        str(folder),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=_Encoder(),
        repeat=False,
    )
    dataset.worker_config.worker_activate(0)
    found = sorted(sample.text for sample in dataset)
    dataset.worker_config.worker_deactivate()
    assert found == sorted(f"text {i}" for i in range(12))


@pytest.mark.parametrize("cut_bytes", [CUT_BYTES, 4 * 512 + 100])
def test_a_cut_tar_gives_what_is_before_the_cut(folder, cut_bytes):
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:cut_bytes])
    found = []
    with pytest.raises(ShardError, match=r"shard-000001\.tar: cannot be read to its end"):
        for sample in read_shard(path):
            found.append(sample)
    assert found == samples(5, len(found))


def test_what_is_no_dataset_is_told(folder, tmp_path):
    (folder / shard_name(0)).unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.tar missing"):
        shard_counts(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ShardError, match="is no finished dataset"):
        shard_counts(empty)
    with pytest.raises(ShardError, match=r"no shard-\*\.tar"):
        list_shards(empty)


def test_no_samples_no_tar_and_an_error_leaves_nothing(tmp_path):
    path = tmp_path / shard_name(0)
    assert write_shard(path, []) == 0

    def failing():
        yield samples(0, 1)[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_shard(path, failing())
    assert not list(tmp_path.iterdir())


def test_keys_are_plain_and_unique():
    ids = ["a.b", "a_b", "a/b", "x" * 300, "x" * 301, "七", "八"]
    keys = [sample_key(i) for i in ids]
    assert len(set(keys)) == len(ids)
    for key in keys:
        assert "." not in key and "/" not in key and key.isascii()
        assert len(f"{key}.safetensors") <= 100 and tarfile.LENGTH_NAME == 100
