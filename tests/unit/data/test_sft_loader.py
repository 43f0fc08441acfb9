"""Conversations from a file, and the batches made of them: every document once an epoch, at any number of ranks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stepaudio_train.audio import read_audio
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.schema import ModelConfig, VocabularyConfig
from stepaudio_train.config.sft import SftConfig, SftDataConfig, SftTrainingConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.conversation_files import Worker
from stepaudio_train.data.conversations import load_conversations, write_report
from stepaudio_train.data.packing import Document
from stepaudio_train.data.sft_loader import SftLoader, validation_batches
from stepaudio_train.data.speech_cache import SpeechCache
from stepaudio_train.testing.small_tokenizers import LINGUISTIC, small_speech_tokenizer
from stepaudio_train.testing.token_data import TEXT_SIZE
from stepaudio_train.tokenizers.released import write_released
from stepaudio_train.tokenizers.speech import SpeechTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(TEXT_SIZE, reserved_size=128)


def documents(count: int, seed: int = 0, longest: int = 40) -> list[Document]:
    """Document i holds the id i + 1 alone, so that batches tell which documents are in them."""
    lengths = np.random.default_rng(seed).integers(2, longest, count)
    return [Document(np.full(n, i + 1, np.int32), np.ones(n, np.float32), 6) for i, n in enumerate(lengths)]


def seen(batch: TokenBatch) -> list[int]:
    return sorted(int(i) for row in batch.input_ids for i in torch.unique(row) if i)


def test_every_document_once_an_epoch_in_another_order():
    loader = SftLoader(documents(100), 64, 4, seed=3)
    steps = loader.steps(1.0)
    first = [loader.next_batch() for _ in range(steps)]
    assert sorted(i for batch in first for i in seen(batch)) == list(range(1, 101))
    second = [loader.next_batch() for _ in range(loader.steps(2.0) - steps)]
    assert sorted(i for batch in second for i in seen(batch)) == list(range(1, 101))
    assert not torch.equal(second[0].input_ids, first[0].input_ids)
    full = torch.cat([batch.input_ids for batch in first])
    assert (full != 0).sum() / full[(full != 0).any(1)].numel() > 0.95


def test_epochs_in_steps():
    loader = SftLoader(documents(100), 64, 4, seed=0)
    one = loader.steps(1.0)
    assert loader.steps(0.5) == math.ceil(one / 2)
    assert loader.steps(2.5) >= 2 * one + 1 and loader.steps(0.001) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_same_global_batches_at_any_data_parallel_size(size):
    alone = SftLoader(documents(50), 64, 8, seed=1)
    ranks = [SftLoader(documents(50), 64, 8, 1, rank, size) for rank in range(size)]
    for _ in range(2 * alone.steps(1.0)):
        together = TokenBatch.concatenate([rank.next_batch() for rank in ranks])
        expected = alone.next_batch()
        assert torch.equal(together.input_ids, expected.input_ids)
        assert torch.equal(together.loss_weights, expected.loss_weights)


@pytest.mark.parametrize("steps", [0, 3, 20])
def test_goes_on_bit_for_bit_at_another_size(steps, tmp_path):
    straight = SftLoader(documents(50), 64, 4, seed=1)
    for _ in range(steps):
        straight.next_batch()
    straight.save(tmp_path)
    resumed = [SftLoader(documents(50), 64, 4, 1, rank, 2) for rank in range(2)]
    for loader in resumed:
        loader.load(tmp_path)
    for _ in range(12):
        together = TokenBatch.concatenate([loader.next_batch() for loader in resumed])
        assert torch.equal(together.input_ids, straight.next_batch().input_ids)


def test_another_order_is_refused(tmp_path):
    SftLoader(documents(20), 64, 4, seed=1).save(tmp_path)
    with pytest.raises(ConfigError, match="training.seed: is not what it was"):
        SftLoader(documents(20), 64, 4, seed=2).load(tmp_path)
    with pytest.raises(ConfigError, match="data: is not what it was"):
        SftLoader(documents(21), 64, 4, seed=1).load(tmp_path)


def test_held_out_batches_are_the_same_at_any_size():
    alone = validation_batches(documents(30), 64, 4, 3)
    ranks = [validation_batches(documents(30), 64, 4, 3, rank, 2) for rank in range(2)]
    assert len(alone) == 3 and {len(batches) for batches in ranks} == {3}
    for batch, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(batch.input_ids, TokenBatch.concatenate(parts).input_ids)
    few = validation_batches(documents(2), 64, 4, 3)
    assert len(few) == 1 and few[0].num_rows == 4 and seen(few[0]) == [1, 2]


def line(*turns: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


def spoken(name: str) -> str:
    return line(("user", [{"type": "audio", "audio": name}]), ("assistant", "one two"))


GOOD = line(("user", "say one"), ("assistant", "one"))


@pytest.fixture
def config_of(text_tokenizer_file):
    def build(path: Path, **data: object) -> SftConfig:
        return SftConfig(
            model=ModelConfig(vocab_size=VOCABULARY.total_size),
            vocabulary=VocabularyConfig(TEXT_SIZE, text_tokenizer=str(text_tokenizer_file)),
            training=SftTrainingConfig(sequence_length=128),
            data=SftDataConfig(str(path), **data),
        )

    return build


def test_bad_lines_are_refused_by_name_and_the_rest_is_used(config_of, tmp_path, caplog):
    path = tmp_path / "my.jsonl"
    bad = {
        '{"messages": [': "invalid JSON",
        line(("user", "one"), ("assistant", [{"type": "text", "txt": "x"}])): "content.0.txt: unknown field",
        line(("assistant", "one")): "turn 1 is assistant",
        line(("user", "one " * 200), ("assistant", "two")): "type training.sequence_length=",
        spoken("a.wav"): "type data.speech_tokenizer=DIR",
    }
    path.write_bytes("\n".join([GOOD, *bad, "", GOOD]).encode() + b'\n{"messages": "\xff"}\n')
    found = load_conversations(config_of(path), VOCABULARY, tmp_path / "tokens")
    assert len(found["data"].documents) == 2
    write_report(found, tmp_path / "data_report.json")
    report = json.loads((tmp_path / "data_report.json").read_text())["data"]
    assert (report["conversations"], report["num_refused"]) == (2, 6)
    expected = dict(zip((2, 3, 4, 5, 6, 9), [*bad.values(), "invalid"], strict=True))
    for refusal, (number, reason) in zip(report["refused"], expected.items(), strict=True):
        assert refusal["name"] == f"{path}:{number}" and reason in refusal["reason"]
    assert "left out" in caplog.text and "my.jsonl:2" in caplog.text


def test_nothing_left_is_an_error(config_of, tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"my\.jsonl: no conversation can be used \(.*my\.jsonl:1: "):
        load_conversations(config_of(path), VOCABULARY, tmp_path / "tokens")


def test_a_tokenizer_of_another_vocabulary_is_refused(config_of, tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text(GOOD)
    with pytest.raises(ConfigError, match=f"type vocabulary.text_size={TEXT_SIZE}"):
        load_conversations(config_of(path), Vocabulary(350), tmp_path / "tokens")


@pytest.fixture(scope="module")
def speech_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speech_tokenizer")
    small_speech_tokenizer().save(folder)
    return folder


def write_recording(path: Path, seconds: float, seed: int = 0) -> None:
    samples = np.random.default_rng(seed).normal(0, 0.1, int(16000 * seconds))
    soundfile.write(path, samples, 16000)


def test_recordings_are_encoded_once_and_bad_ones_refused(config_of, speech_tokenizer, tmp_path, monkeypatch):
    for name, seconds in (("a", 0.5), ("b", 0.7), ("c", 0.01)):
        write_recording(tmp_path / f"{name}.wav", seconds)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(spoken(f"{name}.wav") for name in ("a", "b", "a", "c", "broken", "missing")))
    config = config_of(path, speech_tokenizer=str(speech_tokenizer))
    encoded: list[int] = []
    encode = SpeechTokenizer.encode
    monkeypatch.setattr(SpeechTokenizer, "encode", lambda self, w: encoded.append(len(w)) or encode(self, w))
    found = load_conversations(config, VOCABULARY, tmp_path / "tokens", Worker(device="cpu"))["data"]
    assert len(found.documents) == 3 and sum(encoded) == 3
    assert found.documents[0].ids.tolist() == found.documents[2].ids.tolist()
    reasons = [refusal.reason for refusal in found.refused]
    assert "shorter than 0.12 s" in reasons[0] and "cannot be read as audio" in reasons[1]
    assert "no such recording" in reasons[2]
    again = load_conversations(config, VOCABULARY, tmp_path / "tokens", Worker(device="cpu"))["data"]
    assert sum(encoded) == 3
    assert [d.ids.tolist() for d in again.documents] == [d.ids.tolist() for d in found.documents]
    write_recording(tmp_path / "a.wav", 0.9, seed=1)
    load_conversations(config, VOCABULARY, tmp_path / "tokens", Worker(device="cpu"))
    assert sum(encoded) == 4


def test_codes_of_one_released_tokenizer_are_not_taken_for_anothers(tmp_path):
    write_recording(tmp_path / "a.wav", 0.5)
    first, second = (small_speech_tokenizer(replace(LINGUISTIC, num_blocks=blocks)) for blocks in (1, 2))
    for name, tokenizer in (("first", first), ("second", second)):
        write_released(tokenizer.linguistic, tokenizer.semantic, tmp_path / name)
        for own in (tmp_path / name).glob("*.safetensors"):
            own.unlink()
    recordings = [tmp_path / "a.wav"]
    SpeechCache(tmp_path / "cache", tmp_path / "first").encode(recordings, device="cpu")
    codes, _ = SpeechCache(tmp_path / "cache", tmp_path / "second").look_up(recordings)
    assert not codes
    codes, _ = SpeechCache(tmp_path / "cache", tmp_path / "first").look_up(recordings)
    np.testing.assert_array_equal(
        codes[recordings[0]].linguistic, first.encode([read_audio(recordings[0])])[0].linguistic
    )


def test_processes_share_the_encoding(config_of, speech_tokenizer, tmp_path):
    names = [f"{i}.wav" for i in range(5)]
    for i, name in enumerate(names):
        write_recording(tmp_path / name, 0.3 + 0.1 * i, seed=i)
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(spoken(name) for name in names))
    config = config_of(path, speech_tokenizer=str(speech_tokenizer))

    def other_process() -> None:
        # It comes late, and finds the first one's share in the cache.
        load_conversations(config, VOCABULARY, tmp_path / "tokens", Worker(1, 2, "cpu"))

    shared = load_conversations(config, VOCABULARY, tmp_path / "tokens", Worker(0, 2, "cpu", other_process))["data"]
    alone = load_conversations(config, VOCABULARY, tmp_path / "alone", Worker(device="cpu"))["data"]
    assert [d.ids.tolist() for d in shared.documents] == [d.ids.tolist() for d in alone.documents]
    assert len(shared.documents) == 5
