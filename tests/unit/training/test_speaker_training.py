"""Training of the speaker encoder: what it learns from, how well it tells voices apart, and what is said otherwise."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import recipes.speaker as recipe
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.schema import LoggingConfig
from stepaudio_train.config.speaker import (
    SpeakerEncoderConfig,
    SpeakerTrainConfig,
    SpeakerTrainingConfig,
    speaker_train_problems,
)
from stepaudio_train.data.records import AudioPart, record_to_json, speech_record
from stepaudio_train.data.segments import ShardRecordings
from stepaudio_train.data.shards import ShardSample, finish_dataset, write_shard
from stepaudio_train.models.decoder.flow_files import find_speaker
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder, speaker_features
from stepaudio_train.training import learning
from stepaudio_train.training.speaker import (
    SpeakerClip,
    draw_clips,
    equal_error_rate,
    speaker_error,
    train_speaker_encoder,
)

CPU = torch.device("cpu")
CONFIG = SpeakerTrainConfig(
    encoder=SpeakerEncoderConfig(channels=16, dimension=24),
    training=SpeakerTrainingConfig(steps=60, batch_clips=16, crop_frames=40),
    logging=LoggingConfig(tensorboard=False, wandb="disabled", progress_bar=False),
    device="cpu",
)
VOICES = {"Ann": 4.0, "Bob": 7.0, "Cem": 12.0}


def wobbling(rate_hz: float, seed: int, num_samples: int = 9600) -> Tensor:
    """Noise whose high and low halves take turns, so often a second."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.fft.rfft(torch.randn(num_samples, generator=rng))
    low = torch.arange(len(noise)) < len(noise) // 4
    time_s = torch.arange(num_samples) / 16000
    turn = torch.sin(2 * torch.pi * (rate_hz * time_s + torch.rand(1, generator=rng))) / 2 + 0.5
    return 0.02 * (turn * torch.fft.irfft(noise * low) + (1 - turn) * torch.fft.irfft(noise * ~low))


def voices(seeds: range) -> list[SpeakerClip]:
    return [SpeakerClip(speaker_features(wobbling(rate, s)), name) for name, rate in VOICES.items() for s in seeds]


def write_split(folder: Path, clips: list[tuple[str | None, Tensor | bytes]]) -> Path:
    """A prepared split of recordings with their speakers; bytes stand for a broken file."""
    samples = []
    for number, (speaker, clip) in enumerate(clips):
        content = clip if isinstance(clip, bytes) else io.BytesIO()
        if isinstance(content, io.BytesIO):
            soundfile.write(content, clip.numpy(), 16000, format="FLAC")
            content = content.getvalue()
        record = record_to_json(speech_record(str(number), AudioPart("flac", speaker=speaker)))
        samples.append(ShardSample(f"clip-{number}", {"json": json.dumps(record).encode(), "flac": content}))
    name = "shard-000000.tar"
    finish_dataset(folder, {name: write_shard(folder / name, samples)})
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for split, seeds in (("train", range(8)), ("validation", range(100, 106))):
        write_split(folder / split, [(name, wobbling(rate, s)) for name, rate in VOICES.items() for s in seeds])
    return folder


@pytest.fixture(autouse=True)
def no_log_files(monkeypatch) -> None:
    monkeypatch.setattr(learning, "log_to_file", lambda folder, rank: None)


@pytest.mark.parametrize(
    ("scores", "same", "percent"),
    [
        ([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0], 0),
        ([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1], 100),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0], 50),
        # Between 0.5 and 0.6 one of four is rejected, and one of four accepted.
        ([0.9, 0.8, 0.7, 0.3, 0.6, 0.2, 0.1, 0.0], [1, 1, 1, 1, 0, 0, 0, 0], 25),
        # 1/2 rejected where 0 are accepted, 0 where 1/3 are: the line between crosses at 1/5.
        ([0.9, 0.5, 0.5, 0.2, 0.1], [1, 1, 0, 0, 0], 20),
    ],
)
def test_equal_error_rate_by_hand(scores: list[float], same: list[int], percent: float):
    assert equal_error_rate(scores, same) == pytest.approx(percent)


def test_training_tells_voices_apart_that_it_has_not_heard_say_this():
    losses: list[float] = []
    encoder = train_speaker_encoder(voices(range(8)), CONFIG, CPU, lambda _, metrics: losses.append(metrics["loss"]))
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert speaker_error(encoder, voices(range(100, 106))) < 10
    again = train_speaker_encoder(voices(range(8)), CONFIG, CPU)
    assert torch.equal(again.voice.weight, encoder.voice.weight)


def test_a_run_leaves_an_encoder_its_error_and_the_counts(corpus: Path, tmp_path: Path):
    config = replace(CONFIG, corpus=str(corpus), run_dir=str(tmp_path / "run"), max_clips=12)
    recipe.main(config)
    encoder = find_speaker(tmp_path / "run", 24)
    assert isinstance(encoder, SmallSpeakerEncoder)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train"] == {"num_recordings": 24, "num_named": 24, "num_clips": 12, "num_speakers": 3}
    assert summary["held_out"] == {"num_recordings": 18, "num_named": 18, "num_clips": 18, "num_speakers": 3}
    # Files hold 16 bits, so not all cosines are the same to the last place.
    error = speaker_error(encoder, voices(range(100, 106)))
    assert summary["equal_error_rate_percent"] == pytest.approx(error, abs=3) and error < 15
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < lines[0]["loss"]
    written = (tmp_path / "run" / "speaker.safetensors").stat().st_mtime_ns
    recipe.main(config)
    assert (tmp_path / "run" / "speaker.safetensors").stat().st_mtime_ns == written, "what is finished is left alone"


def test_a_run_that_was_killed_begins_anew(corpus: Path, tmp_path: Path, monkeypatch):
    config = replace(CONFIG, corpus=str(corpus), training=replace(CONFIG.training, steps=20))
    whole, killed = (replace(config, run_dir=str(tmp_path / name)) for name in ("whole", "killed"))
    recipe.main(whole)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(recipe, "speaker_error", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        recipe.main(killed)
    assert not (tmp_path / "killed" / "speaker.safetensors").exists()
    recipe.main(killed)
    for name in ("metrics.jsonl", "speaker.safetensors", "summary.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_speakers_take_turns_and_what_is_of_no_use_is_told(tmp_path: Path, caplog):
    clips = [("Ann", wobbling(4, n)) for n in range(9)] + [("Bob", wobbling(7, n)) for n in range(2)]
    clips += [(None, wobbling(4, 0)), ("Bob", b"no flac"), ("Cem", torch.zeros(800)), ("Cem", wobbling(12, 0, 200000))]
    recordings = ShardRecordings(write_split(tmp_path, clips), 16000)
    everything = draw_clips(recordings, 100, 0)
    assert (everything.num_recordings, everything.num_named) == (15, 14)
    assert Counter(clip.speaker for clip in everything.clips) == {"Ann": 9, "Bob": 2, "Cem": 1}
    assert len(caplog.records) == 2 and "clip-12" in caplog.text and "this is 0.050 s" in caplog.text
    longest = max(everything.clips, key=lambda clip: len(clip.features)).features
    # Of 12.5 s, 10 s are kept, in memory too.
    assert len(longest) == 1000 and longest.untyped_storage().nbytes() == 1000 * 80 * 4
    # Three of each but of those that have fewer.
    drawn = [Counter(clip.speaker for clip in draw_clips(recordings, 8, seed).clips) for seed in range(4)]
    assert all(counts["Ann"] == 3 and counts["Bob"] == 2 and counts["Cem"] == 1 for counts in drawn)
    first = [draw_clips(recordings, 3, seed).clips[0].features for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(first[0], first[1])
    assert not all(torch.equal(first[0], other) for other in first[2:])


def test_a_sample_without_a_readable_record_names_no_speaker(tmp_path: Path, caplog):
    parts = {"a": {"json": b"{}", "flac": b""}, "b": {"flac": b""}}
    finish_dataset(tmp_path, {"shard-000000.tar": 2})
    write_shard(tmp_path / "shard-000000.tar", [ShardSample(key, members) for key, members in parts.items()])
    recordings = ShardRecordings(tmp_path, 16000)
    assert [recordings.speaker(index) for index in range(2)] == [None, None]
    assert len(caplog.records) == 2 and "shard-000000.tar: a" in caplog.text


def test_without_held_out_pairs_there_is_an_encoder_all_the_same(corpus: Path, tmp_path: Path, caplog):
    write_split(tmp_path / "prepared" / "train", [(n, wobbling(r, s)) for n, r in VOICES.items() for s in range(2)])
    write_split(tmp_path / "prepared" / "validation", [(None, wobbling(4, 0))])
    steps = replace(CONFIG.training, steps=2)
    recipe.main(replace(CONFIG, corpus=str(tmp_path / "prepared"), run_dir=str(tmp_path / "run"), training=steps))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["equal_error_rate_percent"] is None and summary["held_out"]["num_named"] == 0
    assert "not measured on held-out recordings" in caplog.text
    assert (tmp_path / "run" / "speaker.safetensors").is_file()


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path, monkeypatch):
    clip = SpeakerClip(speaker_features(wobbling(4, 0)), "Ann")
    with pytest.raises(UserError, match=r"two speakers at least, and there are 1; give recordings .* field speaker"):
        train_speaker_encoder([clip, clip], CONFIG, CPU)
    with pytest.raises(UserError, match="pairs of one speaker and of two"):
        equal_error_rate([0.1, 0.2], [True, True])
    infinite = replace(CONFIG, training=replace(CONFIG.training, scale=float("inf")))
    with pytest.raises(UserError, match=r"step 1: the loss is (nan|inf); type a lower training.learning_rate"):
        train_speaker_encoder(voices(range(2)), infinite, CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    wrong = [f"corpus={tmp_path}/none", "max_clips=1", "training.steps=0", "training.margin=1.5", "encoder.channels=0"]
    with pytest.raises(ConfigError) as told:
        load_config("speaker", SpeakerTrainConfig, wrong, speaker_train_problems)
    for key in [*wrong, "--nproc="]:
        assert f"{key.split('=')[0]}" in str(told.value)
    assert len(told.value.problems) == 6
