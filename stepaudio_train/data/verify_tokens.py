"""A sample of recordings encoded anew, one by one, and compared with what a dataset of tokens holds."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepaudio_train.data.recording_jobs import Recording, RecordingJob
from stepaudio_train.data.shards import read_shard, shard_counts, shard_name
from stepaudio_train.data.token_shards import decode_token_sample
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
    """Recordings with any difference."""

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

    Whole shards are drawn, as many as hold that share, so that no others are read; of the few shards of a small
    dataset, single recordings.

    Args:
        folder: the finished dataset of tokens; its n-th shard was made of the n-th of `jobs`.

    Raises:
        ShardError: the dataset is not finished, or damaged.
    """
    counts = shard_counts(folder)
    written = [number for number in range(len(jobs)) if shard_name(number) in counts]
    drawn = random.Random(0).sample(written, math.ceil(len(written) * min(percent, 100) / 100))
    share = len(written) * percent / 100 / max(1, len(drawn))
    encoder = SpeechTokenizer.from_directory(speech_tokenizer, device)
    agreement = Agreement()
    for number in sorted(drawn):
        stored = _stored(folder / shard_name(number), share)
        for item in jobs[number].recordings(encoder.sample_rate_hz):
            # Recordings that were refused are in the dataset's stats, not among its tokens.
            if isinstance(item, Recording) and item.record.id in stored:
                for name, waveform in item.waveforms.items():
                    (tokens,) = encoder.encode([waveform])
                    agreement.add(f"{item.record.id} {name}", tokens, stored[item.record.id].get(name))
    return agreement


def _stored(shard: Path, share: float) -> dict[str, Mapping[str, SpeechTokens]]:
    """Record id -> its speech, for a share of a shard that follows from the ids."""
    samples = (decode_token_sample(s.members, f"{shard}: {s.key}") for s in read_shard(shard))
    return {s.record.id: s.speech for s in samples if zlib.crc32(s.record.id.encode()) % 100_000 < share * 100_000}


def _streams(tokens: SpeechTokens) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return tokens.linguistic, tokens.semantic
