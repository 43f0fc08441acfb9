import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stepaudio_train.audio import AudioError, peak_normalise, read_audio, resample


def tone(sample_rate_hz: int, duration_s: float = 0.5, pitch_hz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch_hz * np.arange(int(sample_rate_hz * duration_s)) / sample_rate_hz)


def write(path: Path, samples: np.ndarray, sample_rate_hz: int = 16000, **options) -> Path:
    soundfile.write(path, samples, sample_rate_hz, **options)
    return path


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_reads_samples_as_they_are(tmp_path, ending):
    samples = tone(16000)
    read = read_audio(write(tmp_path / f"a.{ending}", samples))
    assert read.dtype == torch.float32
    np.testing.assert_allclose(read.numpy(), samples, atol=1e-4)


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([tone(16000), np.zeros(8000)], axis=1)
    read = read_audio(write(tmp_path / "stereo.wav", stereo, subtype="FLOAT"))
    np.testing.assert_allclose(read.numpy(), stereo.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("rate_hz", [8000, 22050, 48000])
def test_other_rates_are_resampled(tmp_path, rate_hz):
    read = read_audio(write(tmp_path / "tone.wav", tone(rate_hz), rate_hz, subtype="FLOAT"))
    assert abs(len(read) - 8000) <= 1
    # Away from the edges, the tone is the same tone.
    np.testing.assert_allclose(read[1000:7000].numpy(), tone(16000)[1000:7000], atol=2e-3)


def test_resampling_removes_what_the_new_rate_cannot_hold():
    high = torch.from_numpy(tone(48000, pitch_hz=12000.0).astype(np.float32))
    assert resample(high, 48000, 16000)[500:-500].abs().max() < 1e-3


def test_open_files_are_read_too():
    stored = io.BytesIO()
    soundfile.write(stored, tone(16000), 16000, format="FLAC")
    stored.seek(0)
    assert len(read_audio(stored)) == 8000


def broken_files(folder: Path) -> dict[str, Path]:
    whole = write(folder / "whole.wav", tone(16000)).read_bytes()
    flac = write(folder / "whole.flac", tone(16000)).read_bytes()
    files = {"missing": folder / "missing.wav", "empty": write(folder / "empty.wav", np.zeros(0))}
    for name, content in {
        "text": b"not audio",
        "nothing": b"",
        "cut": whole[:9000],
        "cut_flac": flac[: len(flac) // 2],
    }.items():
        files[name] = folder / f"{name}.wav"
        files[name].write_bytes(content)
    files["nan"] = write(folder / "nan.wav", np.array([0.0, np.nan]), subtype="FLOAT")
    return files


@pytest.mark.parametrize("name", ["missing", "empty", "text", "nothing", "cut", "cut_flac", "nan"])
def test_bad_files_are_named(tmp_path, name):
    path = broken_files(tmp_path)[name]
    with pytest.raises(AudioError, match=path.name):
        read_audio(path)


def test_files_written_to_a_pipe_are_not_taken_for_cut_off(tmp_path):
    content = bytearray(write(tmp_path / "a.wav", tone(16000)).read_bytes())
    size_at = content.index(b"data") + 4
    content[size_at : size_at + 4] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "piped.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "piped.wav")) == 8000


def test_peak_normalise():
    quiet, silent = torch.tensor([0.0, -0.05, 0.1]), torch.tensor([0.0, 0.001, 0.0])
    torch.testing.assert_close(peak_normalise(quiet), torch.tensor([0.0, -0.4995, 0.999]))
    torch.testing.assert_close(peak_normalise(silent), torch.tensor([0.0, 0.0999, 0.0]))
    assert peak_normalise(torch.zeros(4)).tolist() == [0.0] * 4
