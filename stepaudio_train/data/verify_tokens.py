"""A sample of recordings encoded anew, one by one, and compared with what a dataset of tokens holds."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepaudio_train.data.recording_jobs import Recording, RecordingJob
from stepaudio_train.data.token_shards import read_token_samples
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens

_NAMED = 20


@dataclass
class Agreement:
    """How many tokens are the same."""

    num_recordings: int = 0
    num_tokens: int = 0
    num_different: int = 0
    """Of `num_tokens`; all tokens of a recording whose counts differ."""
    different: list[str] = field(default_factory=list)
    """Recordings with any difference, or that are missing."""

    def add(self, name: str, wanted: SpeechTokens, found: SpeechTokens | None) -> None:
        """Compare one recording's tokens."""
        total = len(wanted.linguistic) + len(wanted.semantic)
        wrong = total
        if found is not None and [len(x) for x in _streams(found)] == [len(x) for x in _streams(wanted)]:
            wrong = sum(int((x != y).sum()) for x, y in zip(_streams(found), _streams(wanted), strict=True))
        self.num_recordings += 1
        self.num_tokens += total
        self.num_different += wrong
        if wrong:
            self.different.append(name)

    def summary(self) -> dict[str, Any]:
        return {
            "recordings": self.num_recordings,
            "tokens": self.num_tokens,
            "different": self.num_different,
            "recordings_with_differences": self.different[:_NAMED],
        }


def verify_tokens(
    jobs: Sequence[RecordingJob], folder: Path, speech_tokenizer: Path, device: str, percent: float
) -> Agreement:
    """Encode about `percent` of the recordings again in fp32 and compare; the same ones each time.

    Args:
        folder: the finished dataset of tokens that was made of `jobs`.

    Raises:
        ShardError: the dataset is not finished, or damaged.
    """
    encoder = SpeechTokenizer.from_directory(speech_tokenizer, device)
    stored = {
        sample.record.id: sample.speech for sample in read_token_samples(folder) if _chosen(sample.record.id, percent)
    }
    agreement = Agreement()
    for job in jobs:
        for item in job.recordings(encoder.sample_rate_hz):
            # Recordings that were refused are in the dataset's stats, not among its tokens.
            if isinstance(item, Recording) and item.record.id in stored:
                for name, waveform in item.waveforms.items():
                    (tokens,) = encoder.encode([waveform])
                    agreement.add(f"{item.record.id} {name}", tokens, stored[item.record.id].get(name))
    return agreement


def _streams(tokens: SpeechTokens) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return tokens.linguistic, tokens.semantic


def _chosen(id: str, percent: float) -> bool:
    return zlib.crc32(id.encode()) % 100_000 < percent * 1000
