"""Recordings of every kind become the same tokens, on any number of processes; what is stored can be verified."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.numpy
import soundfile
import torch

from stepaudio_train.cli import main
from stepaudio_train.config.errors import UserError
from stepaudio_train.data import recording_jobs
from stepaudio_train.data.shards import read_shard, write_shard
from stepaudio_train.data.token_shards import read_token_samples
from stepaudio_train.data.tokenize import TokenizeOptions, tokenize, verify
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five")


@pytest.fixture(scope="module")
def speech_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speech_tokenizer")
    small_speech_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six recordings, one that is no audio, and one too short for a token group."""
    made = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    for number, word in enumerate(WORDS):
        soundfile.write(made / f"{word}_ann_{number}.flac", random.uniform(-0.5, 0.5, 9000 + 500 * number), 16000)
        (made / f"{word}_ann_{number}.txt").write_text(word)
    (made / "bad_ann_6.flac").write_bytes(b"no audio")
    soundfile.write(made / "short_ann_7.flac", random.uniform(-0.5, 0.5, 900), 16000)
    return made


@pytest.fixture
def options(folder, speech_tokenizer, text_tokenizer_file, tmp_path) -> TokenizeOptions:
    return TokenizeOptions(folder, tmp_path / "tokens", text_tokenizer_file, speech_tokenizer, device="cpu")


def tokens_by_text(output: Path) -> dict[str, tuple[list[int], list[int]]]:
    found = {}
    for sample in read_token_samples(output):
        (part,) = sample.record.audio_parts()
        codes = sample.speech[part.audio]
        found[part.text] = (codes.linguistic.tolist(), codes.semantic.tolist())
    return found


@pytest.fixture(scope="module")
def wanted(folder, speech_tokenizer) -> dict[str, tuple[list[int], list[int]]]:
    encoder = SpeechTokenizer.from_directory(speech_tokenizer, "cpu")
    found = {}
    for number, word in enumerate(WORDS):
        samples, _ = soundfile.read(folder / f"{word}_ann_{number}.flac", dtype="float32")
        (codes,) = encoder.encode([torch.from_numpy(samples)])
        found[word] = (codes.linguistic.tolist(), codes.semantic.tolist())
    return found


def write_manifest(folder: Path, to: Path) -> Path:
    rows = [{"audio": str(path), "text": path.name.split("_")[0]} for path in sorted(folder.glob("*.flac"))]
    to.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to


def write_webdataset(folder: Path, to: Path) -> Path:
    to.mkdir()
    with tarfile.open(to / "part-0.tar", "w") as tar:
        for number, path in enumerate(sorted(folder.glob("*.flac"))):
            text = path.name.split("_")[0]
            beside = ("txt", text.encode()) if number % 2 else ("json", json.dumps({"sentence": text}).encode())
            for ending, content in (("flac", path.read_bytes()), beside):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return to


def hugging_face(folder: Path) -> datasets.Dataset:
    paths = sorted(folder.glob("*.flac"))
    rows = {
        "audio": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "transcription": [path.name.split("_")[0] for path in paths],
    }
    return datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))


def test_every_kind_of_source_gives_the_same_tokens(options, folder, wanted, tmp_path):
    hugging_face(folder).save_to_disk(tmp_path / "saved")
    hugging_face(folder).to_parquet(tmp_path / "rows.parquet")
    sources = {
        "folder": folder,
        "manifest": write_manifest(folder, tmp_path / "manifest.jsonl"),
        "webdataset": write_webdataset(folder, tmp_path / "tars"),
        "saved": tmp_path / "saved",
        "parquet": tmp_path / "rows.parquet",
    }
    for kind, source in sources.items():
        stats = tokenize(replace(options, source=source, output=tmp_path / "out" / kind))[""]
        assert tokens_by_text(tmp_path / "out" / kind) == wanted, kind
        reasons = " ".join(stats.refused)
        assert len(stats.refused) == 2 and "cannot be read" in reasons and "too short" in reasons, kind


def test_processes_write_the_same_bytes_and_go_on_for_each_other(options, monkeypatch, tmp_path):
    monkeypatch.setattr(recording_jobs, "RECORDINGS_PER_SHARD", 2)
    alone = tokenize(options)
    several = replace(options, output=tmp_path / "several", num_workers=2)
    assert tokenize(several) == alone
    shards = sorted(path.name for path in options.output.glob("*.tar"))
    assert len(shards) == 4
    for name in shards:
        assert (options.output / name).read_bytes() == (several.output / name).read_bytes()
    # Half of it gone: the other number of processes fills it in.
    for name in shards[1:3]:
        (several.output / name).unlink()
        (several.output / name).with_suffix(".stats.json").unlink()
    assert tokenize(replace(several, num_workers=1)) == alone
    assert (several.output / shards[1]).read_bytes() == (options.output / shards[1]).read_bytes()


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same(options, tmp_path):
    alone = tokenize(options)
    assert tokenize(replace(options, output=tmp_path / "ray", ray="local")) == alone


def test_verification_finds_what_is_not_what_it_should_be(options, tmp_path, capsys):
    tokenize(options)
    agreement = verify(replace(options, verify_percent=100))[""]
    assert agreement.num_recordings == 6 and agreement.num_tokens > 100 and not agreement.num_different
    (shard,) = options.output.glob("*.tar")
    stored = list(read_shard(shard))
    arrays = safetensors.numpy.load(stored[2].members["safetensors"])
    arrays["0.semantic"][5] ^= 1
    stored[2] = replace(stored[2], members={**stored[2].members, "safetensors": safetensors.numpy.save(arrays)})
    write_shard(shard, stored)
    found = verify(replace(options, verify_percent=100))[""]
    assert (found.num_different, len(found.different)) == (1, 1)
    summary = json.loads((options.output / "verify.json").read_text())
    assert summary["all"]["recordings_with_differences"] == found.different
    arguments = [str(options.source), str(options.output), "--text-tokenizer", str(options.text_tokenizer)]
    arguments += ["--speech-tokenizer", str(options.speech_tokenizer), "--device", "cpu", "--verify", "100"]
    # One of 162 tokens is more than rounding.
    assert main(["tokenize", *arguments]) == 1
    assert "tokens differ" in capsys.readouterr().out


def test_bf16_is_another_piece_of_work(options):
    tokenize(options)
    with pytest.raises(UserError, match="other tokenizers"):
        tokenize(replace(options, precision="bf16"))


def test_datasets_without_audio_or_with_splits_are_named(options, tmp_path):
    datasets.Dataset.from_dict({"sound": [1]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="no column `audio`, but sound"):
        tokenize(replace(options, source=tmp_path / "none.parquet"))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"audio": [1]})}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="give one of them: .*splits/train"):
        tokenize(replace(options, source=tmp_path / "splits"))
