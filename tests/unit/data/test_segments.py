"""Segments of recordings: what is drawn when, what lies around it, and what is left out."""

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stepaudio_train.audio.pitch import yin
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.vocoder import MelConfig
from stepaudio_train.data.prepare import PrepareOptions, prepare
from stepaudio_train.data.segments import FileRecordings, SegmentBatches, find_corpus

MEL = MelConfig()
RATE_HZ, SEGMENT = MEL.sample_rate_hz, 4096


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recordings at 22.05 kHz whose samples say which recording they are of, and where in it; the last is short."""
    for number, length in enumerate((8000, 9000, 10000, 2000)):
        ramp = (number + 1) / 8 + np.arange(length) / 2**17
        soundfile.write(tmp_path / f"{number}.wav", ramp, RATE_HZ, subtype="FLOAT")
    return tmp_path


def recordings(folder: Path) -> FileRecordings:
    return FileRecordings(str(folder), RATE_HZ, sorted(str(path) for path in folder.glob("*.wav")))


def batches(folder: Path, seed: int = 0, **more: int) -> SegmentBatches:
    return SegmentBatches(recordings(folder), MEL, 4, SEGMENT, seed, **more)


def test_a_segment_is_a_stretch_of_a_recording_with_what_lies_around_it(folder: Path):
    seen = set()
    drawn = batches(folder)
    margin = drawn.margin_samples
    for step in range(5):
        for waveform in drawn[step].waveforms:
            assert len(waveform) == SEGMENT + 2 * margin
            number = int(waveform[margin] * 8) - 1
            start = round(float(waveform[margin] - (number + 1) / 8) * 2**17)
            whole = torch.nn.functional.pad(recordings(folder).read(number), (margin, SEGMENT))
            torch.testing.assert_close(waveform, whole[start : start + len(waveform)])
            seen.add((number, start))
    assert len({start for _, start in seen}) > 10
    assert {start for number, start in seen if number == 3} == {0}


def test_every_recording_comes_once_an_epoch_and_orders_differ(folder: Path):
    drawn = batches(folder)
    orders = [[int(row[drawn.margin_samples] * 8) for row in drawn[step].waveforms] for step in range(6)]
    assert all(sorted(order) == [1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_processes_share_a_batch_that_follows_from_seed_and_step(folder: Path):
    whole = batches(folder)[7]
    shares = [batches(folder, rank=rank, num_ranks=2)[7] for rank in range(2)]
    assert torch.equal(torch.cat([share.waveforms for share in shares]), whole.waveforms)
    assert torch.equal(torch.cat([share.f0_hz for share in shares]), whole.f0_hz)
    assert not torch.equal(batches(folder, seed=1)[7].waveforms, whole.waveforms)


def test_pitch_at_the_ends_is_that_of_the_whole_recording(tmp_path: Path):
    voice = 0.4 * np.sin(2 * np.pi * 110 * np.arange(RATE_HZ) / RATE_HZ)
    soundfile.write(tmp_path / "voice.wav", voice, RATE_HZ)
    drawn = SegmentBatches(recordings(tmp_path), MEL, 3, SEGMENT, seed=0)
    f0_hz = drawn[0].f0_hz
    assert f0_hz.shape == (3, SEGMENT // MEL.hop_samples)
    inside = yin(torch.from_numpy(voice).float(), RATE_HZ, MEL.hop_samples / RATE_HZ).f0_hz[5:-5]
    assert (f0_hz - inside.mean()).abs().max() < 1


def test_what_cannot_be_read_is_named_once_and_the_rest_goes_on(folder: Path, caplog):
    (folder / "1.wav").write_bytes(b"no audio")
    drawn = batches(folder)
    with caplog.at_level(logging.WARNING):
        shown = {int(row[drawn.margin_samples] * 8) for step in range(6) for row in drawn[step].waveforms}
    assert shown == {1, 3, 4}
    assert len([line for line in caplog.messages if "1.wav" in line]) == 1
    for path in folder.glob("*.wav"):
        path.write_bytes(b"no audio")
    with pytest.raises(UserError, match="no recording of it can be read"):
        batches(folder)[0]


def test_a_folder_needs_no_transcripts_and_holds_out_some(folder: Path):
    train, clips = find_corpus(folder, "train", "validation", 2, RATE_HZ, seed=0)
    learned = {float(train.read(index)[0]) for index in range(len(train))}
    held_out = {float(clip[0]) for clip in clips}
    assert len(learned) == len(held_out) == 2 and not learned & held_out
    with pytest.raises(UserError, match="held_out_clips"):
        find_corpus(folder, "train", "validation", 4, RATE_HZ, seed=0)


def test_a_prepared_corpus_is_taken_by_its_splits(tmp_path: Path):
    source, prepared = tmp_path / "recordings", tmp_path / "prepared"
    source.mkdir()
    for number in range(20):
        soundfile.write(source / f"{number}.wav", 0.5 * speech_like(8000, number).clamp(-1, 1).numpy(), 16000)
    report = prepare(PrepareOptions(source, prepared, allow_untranscribed=True, num_workers=1))
    train, clips = find_corpus(prepared, "train", "validation", 2, RATE_HZ, seed=0)
    assert len(train) == report.samples["train"]
    assert len(clips) == min(2, report.samples["validation"])
    assert len(train.read(0)) == 8000 * RATE_HZ // 16000
    (damaged,) = prepared.glob("train/*.tar")
    content = bytearray(damaged.read_bytes())
    content[: 3 * 512] = b"\xff" * (3 * 512)
    damaged.write_bytes(content)
    assert train.read(0) is None
    assert train.read(1) is not None
