"""Recordings in: any file that libsndfile reads becomes mono float32 samples at one rate."""

from __future__ import annotations

import re
from os import PathLike, fspath
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor

from stepaudio_train.audio.resampling import resample
from stepaudio_train.config.errors import UserError

PEAK_FLOOR = 0.01
PEAK_TARGET = 0.999
_CHUNK_SIZE = re.compile(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_SIZE = 0x7FFF0000


class AudioError(UserError, ValueError):
    """A recording cannot be used. The message names it and says why."""


def read_audio(source: str | PathLike[str] | BinaryIO, sample_rate_hz: int = 16000, name: str | None = None) -> Tensor:
    """Read a recording as mono samples.

    Args:
        source: a path, or an open binary file such as `io.BytesIO`.
        sample_rate_hz: rate of the result; other rates are resampled, up as well as down.
        name: what errors call the recording; the path if not given.

    Returns:
        [samples] float32, the mean over the channels, nominally within -1..1.

    Raises:
        AudioError: missing, unreadable, cut off, empty or non-finite audio.
    """
    if isinstance(source, (str, PathLike)):
        source = fspath(source)
        name = name or source
    name = name or "audio"
    try:
        with soundfile.SoundFile(source) as file:
            cut_off = _is_cut_off(file.extra_info)
            num_frames, file_rate_hz = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise AudioError(f"{name}: cannot be read as audio: {error}") from error
    if cut_off or len(samples) < num_frames:
        raise AudioError(f"{name}: cut off: its header promises more samples than there are")
    if len(samples) == 0:
        raise AudioError(f"{name}: holds no samples")
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError(f"{name}: holds samples that are not finite numbers")
    return resample(torch.from_numpy(mono), file_rate_hz, sample_rate_hz)


def _is_cut_off(libsndfile_log: str) -> bool:
    """libsndfile shortens a cut-off WAV or AIFF without an error; only its log tells. Writers to a pipe cannot know the
    size and promise the most that fits: that is no sign of a cut."""
    found = _CHUNK_SIZE.search(libsndfile_log)
    return found is not None and int(found[2]) < int(found[1]) < _UNKNOWN_SIZE


def peak_normalise(waveform: Tensor) -> Tensor:
    """Scale [..., samples] so that the largest magnitude is 0.999.

    Peaks under 0.01 count as 0.01, so that near-silence is not blown up (as in the released tokenizer).
    """
    peak = waveform.abs().amax(dim=-1, keepdim=True).clamp(min=PEAK_FLOOR)
    return waveform / peak * PEAK_TARGET
