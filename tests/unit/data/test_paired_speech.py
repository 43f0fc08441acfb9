"""Recordings and codes find each other, frame by frame, and what does not fit is named."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stepaudio_train.audio import AudioError, read_audio, resample
from stepaudio_train.audio.mel import decoder_log_mel
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.decoder import FlowConfig
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.vocoder import MelConfig
from stepaudio_train.data.paired_speech import PairedSpeech, clip_mel
from stepaudio_train.data.shards import (
    ShardSample,
    finish_dataset,
    list_shards,
    read_shard,
    shard_counts,
    write_shard,
)
from stepaudio_train.data.token_shards import decode_token_sample, encode_token_sample
from stepaudio_train.testing.paired_data import PairedCorpus, write_paired_corpus
from stepaudio_train.tokenizers.dual import merge_streams
from stepaudio_train.tokenizers.speech import SpeechTokenizer
from stepaudio_train.tokenizers.vocabulary import AUDIO_IDS

CONFIG = FlowConfig()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> PairedCorpus:
    return write_paired_corpus(tmp_path_factory.mktemp("paired"))


def no_speaker(waveform: Tensor) -> Tensor:
    return torch.zeros(CONFIG.speaker_size)


def paired(recordings: Path, codes: Path) -> PairedSpeech:
    return PairedSpeech(recordings, codes, CONFIG, no_speaker)


def recorded_mels(corpus: PairedCorpus) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and all frames of every recording, from the files themselves."""
    tokenizer = SpeechTokenizer.from_directory(corpus.speech_tokenizer, "cpu")
    for path in corpus.recordings.iterdir():
        waveform = read_audio(path)
        speech = tokenizer.encode([waveform])[0]
        ids = merge_streams(speech.linguistic, speech.semantic, AUDIO_IDS)
        yield torch.from_numpy(ids), decoder_log_mel(resample(waveform, 16000, 22050)[None], MelConfig())[0].T


def test_codes_and_frames_are_of_one_recording(corpus):
    speech = paired(corpus.prepared / "train", corpus.tokens / "train")
    known = list(recorded_mels(corpus))
    assert len(speech) == shard_counts(corpus.prepared / "train")["shard-000000.tar"] > 5
    for index in range(len(speech)):
        tokens, mel, _ = speech[index]
        (whole,) = (frames for ids, frames in known if torch.equal(ids, tokens))
        assert len(mel) == speech.num_frames[index] == CONFIG.num_frames(len(tokens))
        # The last frames hear beyond the end, where a shorter recording is padded.
        common = min(len(whole), len(mel)) - 4
        torch.testing.assert_close(mel[:common], whole[:common], atol=1e-3, rtol=1e-3)


def test_codes_find_their_recordings_in_any_order_and_number(corpus, tmp_path, caplog):
    samples = [s for path in list_shards(corpus.tokens / "train") for s in read_shard(path)]
    counts = {
        "shard-000000.tar": write_shard(tmp_path / "shard-000000.tar", [samples[5], samples[2]]),
        "shard-000001.tar": write_shard(tmp_path / "shard-000001.tar", [samples[0]]),
    }
    finish_dataset(tmp_path, counts)
    some, all_of_them = (paired(corpus.prepared / "train", f) for f in (tmp_path, corpus.tokens / "train"))
    for index, other in enumerate((5, 2, 0)):
        assert all(torch.equal(a, b) for a, b in zip(some[index], all_of_them[other], strict=True))
    with pytest.raises(UserError, match="holds no codes of the recordings"):
        paired(corpus.prepared / "validation", tmp_path)
    assert f"{samples[5].key}: no recording in" in caplog.text


def test_codes_that_cannot_be_are_named(corpus, tmp_path, caplog):
    (first, second, *_) = read_shard(list_shards(corpus.tokens / "train")[0])
    sample = decode_token_sample(first.members, "")
    too_high = replace(sample.speech["0"], semantic=np.full(90, 4096))
    wrong = [
        encode_token_sample(replace(sample, speech={"0": too_high})),
        ShardSample(second.key, {"json": second.members["json"], "safetensors": b"none"}),
    ]
    finish_dataset(tmp_path, {"shard-000000.tar": write_shard(tmp_path / "shard-000000.tar", wrong)})
    with pytest.raises(UserError, match="holds no codes of the recordings"):
        paired(corpus.prepared / "train", tmp_path)
    shard = tmp_path / "shard-000000.tar"
    assert f"{shard}: {first.key}: semantic code 4096 at position 0 is outside 0..4095" in caplog.text
    assert f"{shard}: {second.key}: its speech tokens cannot be read" in caplog.text


def test_a_damaged_recording_is_named_and_replaced(corpus, tmp_path, caplog):
    shutil.copytree(corpus.prepared / "train", tmp_path / "train")
    (shard,) = list_shards(tmp_path / "train")
    samples = list(read_shard(shard))
    content = shard.read_bytes()
    at = content.index(samples[3].members["flac"])
    shard.write_bytes(content[:at] + b"x" * 64 + content[at + 64 :])
    damaged, whole = (paired(f / "train", corpus.tokens / "train") for f in (tmp_path, corpus.prepared))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(damaged[3].mel, whole[4].mel) and torch.equal(damaged[3].tokens, whole[4].tokens)
        assert torch.equal(damaged[2].mel, whole[2].mel)
    assert samples[3].key in caplog.text


def test_codes_of_another_recording_are_refused():
    waveform = speech_like(16000)
    exact = resample(waveform, 16000, 22050)
    assert clip_mel(waveform, 40, CONFIG).shape == (CONFIG.num_frames(40), 80)
    assert len(exact) // 256 > CONFIG.num_frames(40)
    assert clip_mel(waveform, 42, CONFIG).shape == (CONFIG.num_frames(42), 80), "rounded up by a frame"
    for wrong in (30, 45):
        with pytest.raises(AudioError, match=r"is 1.00 s long, and its \d+ tokens stand for .* tokenize it again"):
            clip_mel(waveform, wrong, CONFIG)


@pytest.mark.parametrize("num_samples", [*range(4000, 20000, 1511), 480000, 480100])
def test_every_length_of_a_recording_fits_its_codes(corpus, num_samples):
    waveform = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, num_samples)).float()
    speech = SpeechTokenizer.from_directory(corpus.speech_tokenizer, "cpu").encode([waveform])[0]
    ids = merge_streams(speech.linguistic, speech.semantic, AUDIO_IDS)
    assert len(clip_mel(waveform, len(ids), CONFIG)) == CONFIG.num_frames(len(ids))


def test_batches_keep_the_limit_and_hold_every_clip_once_an_epoch(corpus):
    speech = paired(corpus.prepared / "train", corpus.tokens / "train")
    batches = list(islice(speech.batches(200, seed=1), 60))
    assert batches == list(islice(speech.batches(200, seed=1), 60)) != list(islice(speech.batches(200, seed=2), 60))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(speech.num_frames[index] for index in batch) <= 200
    assert max(map(len, batches)) > 1
    drawn = [index for batch in batches for index in batch]
    epochs = [drawn[start : start + len(speech)] for start in range(0, len(drawn) - len(speech), len(speech))]
    assert len(epochs) > 1 and all(sorted(epoch) == list(range(len(speech))) for epoch in epochs)
    assert epochs[0] != epochs[1]
