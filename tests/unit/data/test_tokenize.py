"""Recordings and texts to token shards: nothing lost, what is bad is named, an interrupted run goes on."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stepaudio_train.audio import read_audio
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import BlendEntry, DataConfig
from stepaudio_train.data.loader import build_train_loader
from stepaudio_train.data.prepare import PrepareOptions, prepare
from stepaudio_train.data.records import parse_record
from stepaudio_train.data.shards import list_shards, read_shard
from stepaudio_train.data.token_shards import STATS_FILE, TokenStats, read_token_samples
from stepaudio_train.data.tokenize import TokenizeOptions, divide_text, tokenize
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer


@pytest.fixture(scope="module")
def speech_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speech_tokenizer")
    small_speech_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    for digit in range(10):
        for take in range(40):
            noise = random.uniform(-0.5, 0.5, int(8000 * random.uniform(0.3, 0.8)))
            soundfile.write(folder / f"{digit}_ann_{take}.wav", noise, 8000)
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(PrepareOptions(folder, output, join_max=2))
    return output


@pytest.fixture
def options(prepared, speech_tokenizer, text_tokenizer_file, tmp_path) -> TokenizeOptions:
    return TokenizeOptions(
        prepared, tmp_path / "tokens", text_tokenizer_file, speech_tokenizer, batch_audio_s=20.0, device="cpu"
    )


@pytest.fixture(scope="module")
def whole(prepared, speech_tokenizer, text_tokenizer_file, tmp_path_factory) -> tuple[Path, dict[str, TokenStats]]:
    """The prepared recordings, tokenized once for all tests that only look."""
    output = tmp_path_factory.mktemp("whole") / "tokens"
    return output, tokenize(TokenizeOptions(prepared, output, text_tokenizer_file, speech_tokenizer, device="cpu"))


def test_every_recording_of_every_split(whole, prepared, renderer):
    output, stats = whole
    report = json.loads((prepared / "report.json").read_text())
    assert {split: s.num_samples for split, s in stats.items()} == report["samples"]
    for split, hours in report["hours"].items():
        assert stats[split].duration_s / 3600 == pytest.approx(hours, rel=1e-6)
        assert TokenStats.read(output / split / STATS_FILE) == stats[split]
    train = stats["train"].tasks
    assert train["asr"].num_samples == train["continuation"].num_samples == train["text"].num_samples
    assert 0 < train["interleaved"].num_samples < train["asr"].num_samples
    samples = list(read_token_samples(output / "train"))
    assert len({s.record.id for s in samples}) == len(samples) == report["samples"]["train"]
    assert sum(len(renderer.render(s, "asr")) for s in samples) == train["asr"].num_tokens
    for sample in samples:
        part = sample.record.audio_parts()[0]
        tokens = sample.speech[part.audio]
        assert len(tokens.semantic) == pytest.approx(25 * part.duration_s, abs=2)
        assert len(tokens.linguistic) == pytest.approx(16.7 * part.duration_s, abs=2)


def test_codes_are_those_of_the_recording_alone(whole, prepared, speech_tokenizer):
    output, _ = whole
    encoder = SpeechTokenizer.from_directory(speech_tokenizer, "cpu")
    by_id = {s.record.id: s for s in read_token_samples(output / "test")}
    for stored in list(read_shard(list_shards(prepared / "test")[0]))[:5]:
        record = parse_record(stored.members["json"], "x")
        (alone,) = encoder.encode([read_audio(io.BytesIO(stored.members["flac"]), 16000)])
        found = by_id[record.id].speech["0"]
        assert np.array_equal(found.linguistic, alone.linguistic)
        assert np.array_equal(found.semantic, alone.semantic)


def test_the_loader_reads_what_was_written(whole, text_tokenizer_file, renderer):
    output, _ = whole
    blend = {t: BlendEntry(t, str(output / "train")) for t in ("asr", "tts", "interleaved", "continuation")}
    config = DataConfig("shards", blend, packing_buffer_samples=64)
    loader = build_train_loader(config, renderer.vocabulary, 256, 4, 0, text_tokenizer=text_tokenizer_file)
    batch = loader.next_batch()
    assert (batch.input_ids != 0).float().mean() > 0.9 and not loader.num_skipped["damaged"]


def test_an_interrupted_run_goes_on_with_the_missing_shard(options, monkeypatch):
    calls = []
    original = SpeechTokenizer.encode

    def counted(self, waveforms, peak_norm=True):
        calls.append(len(waveforms))
        return original(self, waveforms)

    monkeypatch.setattr(SpeechTokenizer, "encode", counted)
    whole = tokenize(options)
    first = sum(calls)
    calls.clear()
    assert tokenize(options) == whole and not calls
    shards = sorted((options.output / "train").glob("*.tar"))
    content = shards[1].read_bytes()
    shards[1].with_suffix(".stats.json").unlink()
    shards[1].write_bytes(content[:1000])
    assert tokenize(options) == whole
    assert 0 < sum(calls) < first
    assert shards[1].read_bytes() == content


def test_bad_samples_and_cut_shards_are_named(options, prepared, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(prepared / "test", damaged / "test")
    shard = damaged / "test" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[520:540] = b"?" * 20  # inside the first record
    shard.write_bytes(bytes(content[: len(content) * 2 // 3]))
    stats = tokenize(replace(options, source=damaged))["test"]
    assert 0 < stats.num_samples < json.loads((prepared / "report.json").read_text())["samples"]["test"]
    assert len(stats.refused) == 2
    assert all("shard-000000.tar" in reason for reason in stats.refused)
    assert any("cannot be read to its end" in reason for reason in stats.refused)


def test_other_tokenizers_or_work_are_refused(options, prepared, tmp_path):
    options = replace(options, source=prepared / "test")
    tokenize(options)
    with pytest.raises(UserError, match="other tokenizers"):
        tokenize(replace(options, max_text_tokens=10))
    with pytest.raises(UserError, match="give a speech tokenizer"):
        tokenize(replace(options, speech_tokenizer=None, output=tmp_path / "other"))
    with pytest.raises(UserError, match="no such file or folder"):
        tokenize(replace(options, source=tmp_path / "absent"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no usable recording"):
        tokenize(replace(options, source=tmp_path / "nothing"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(UserError, match="is not empty"):
        tokenize(replace(options, output=tmp_path / "mine"))


def test_texts(tmp_path, text_tokenizer_file, renderer):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one two\n\n  three  \n", encoding="utf-8")
    lines = [json.dumps({"text": "four\nfive"}), '{"txt": 1}', "no json", json.dumps({"text": " "})]
    (folder / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    stats = tokenize(TokenizeOptions(folder, tmp_path / "out", text_tokenizer_file))[""]
    samples = list(read_token_samples(tmp_path / "out"))
    assert [s.record.messages[0].content[0].text for s in samples] == ["one two", "three", "four\nfive"]
    assert [s.record.id for s in samples] == ["a.txt:1", "a.txt:3", "b.jsonl:1"]
    assert stats.tasks["text"].num_tokens == sum(len(renderer.render(s, "text")) for s in samples)
    assert not stats.tasks["asr"].num_samples
    assert [reason.split("/")[-1].split(": ")[0] for reason in stats.refused] == ["b.jsonl:2", "b.jsonl:3", "b.jsonl:4"]


def test_long_texts_are_divided_at_lines_and_words(renderer):
    tokenizer = renderer.text_tokenizer
    text = "\n".join(["one two three four five six seven"] * 20)
    parts = divide_text(text, tokenizer, 100)
    assert all(len(tokenizer.encode(part)) <= 100 for part in parts)
    assert "\n".join(parts) == text
    words = " ".join(["seven"] * 500)
    assert " ".join(divide_text(words, tokenizer, 50)) == words
    unbroken = "x" * 300
    assert "".join(divide_text(unbroken, tokenizer, 50)) == unbroken
