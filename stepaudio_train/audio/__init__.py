"""Waveforms: read, resample, level, features."""

from stepaudio_train.audio.reading import AudioError, peak_normalise, read_audio
from stepaudio_train.audio.resampling import resample

__all__ = ["AudioError", "peak_normalise", "read_audio", "resample"]
