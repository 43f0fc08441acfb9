"""How many ids differ between a batch, one recording at a time, and a stream fed in pieces of random sizes.

    .venv/bin/python benchmarks/tokenization_agreement.py --audio recordings [--tokenizer DIR] [--json FILE]

Recordings of yours, and made ones: noise, silence, one sample, 10 ms, long, other rates and stereo. The stream's
semantic pieces are short ones with context, and `encode` follows the same rule; the last column compares that rule with
the released 30 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import parser, report
from tokenization import random_tokenizers
from torch import Tensor

from stepaudio_train.audio import peak_normalise, read_audio, resample
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.data.sources import AUDIO_SUFFIXES
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens
from stepaudio_train.tokenizers.streaming import SpeechStream

_PIECE_TOKENS, _CONTEXT_TOKENS = 6, 50


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--audio", type=Path, help="folder of recordings")
    options.add_argument("--files", type=int, default=100, help="recordings of the folder, at most")
    options.add_argument("--tokenizer", type=Path, help="directory of a speech tokenizer, instead of random weights")
    options.add_argument("--size", default="released", choices=("released", "small"), help="of random weights")
    options.add_argument("--long-s", type=float, default=600.0, help="length of the long recording")
    options.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    chosen = options.parse_args()
    torch.manual_seed(0)
    if chosen.tokenizer:
        tokenizer = SpeechTokenizer.from_directory(chosen.tokenizer, "cpu", chosen.precision)
    else:
        made = random_tokenizers(chosen.size, [speech_like(80000, seed) for seed in range(8)])
        tokenizer = SpeechTokenizer(*made, "cpu", chosen.precision)
    rows = [_compare(tokenizer, name, clips) for name, clips in _sets(chosen.audio, chosen.files, chosen.long_s)]
    report(f"Ids that differ, {chosen.precision}", rows, chosen.json)


def _sets(audio: Path | None, files: int, long_s: float) -> Iterator[tuple[str, list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    if audio is not None:
        paths = sorted(path for path in audio.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
        yield str(audio.name), [read_audio(path) for path in paths[:: max(1, len(paths) // files)][:files]]
    yield "noise", [0.1 * torch.randn(n, generator=generator) for n in (48000, 50001, 7777, 3840, 3841)]
    yield "silence", [torch.zeros(32000)]
    yield "1 sample, 10 ms, 25 ms, 55 ms", [speech_like(length) for length in (1, 160, 400, 880)]
    yield f"one of {long_s:g} s", [speech_like(round(long_s * 16000))]
    stereo = torch.stack([speech_like(96000, 1), speech_like(96000, 2)]).mean(dim=0)
    yield (
        "8, 44.1, 48 kHz, stereo",
        [
            *(resample(speech_like(3 * rate_hz), rate_hz, 16000) for rate_hz in (8000, 44100, 48000)),
            resample(stereo, 48000, 16000),
        ],
    )


def _compare(tokenizer: SpeechTokenizer, name: str, clips: list[Tensor]) -> dict[str, Any]:
    rule = tokenizer.with_pieces(_PIECE_TOKENS, _CONTEXT_TOKENS)
    clips = [peak_normalise(clip) for clip in clips]
    released, batch = tokenizer.encode(clips), rule.encode(clips, peak_norm=False)
    alone = [rule.encode([clip], peak_norm=False)[0] for clip in clips]
    released_alone = [tokenizer.encode([clip])[0] for clip in clips]
    streamed = [_streamed(rule, clip) for clip in clips]
    return {
        "recordings": name,
        "linguistic ids": sum(len(tokens.linguistic) for tokens in batch),
        "batch / one by one": _different(batch, alone, 0),
        "batch / stream": _different(batch, streamed, 0),
        "semantic ids": sum(len(tokens.semantic) for tokens in batch),
        "30 s: batch / one by one": _different(released, released_alone, 1),
        "short pieces: batch / one by one": _different(batch, alone, 1),
        "batch / stream ": _different(batch, streamed, 1),
        "short pieces / 30 s": _different(batch, released, 1),
    }


def _streamed(rule: SpeechTokenizer, clip: Tensor) -> SpeechTokens:
    stream, rng, parts, start = SpeechStream(rule), np.random.default_rng(len(clip)), [], 0
    while start < len(clip):
        size = int(rng.integers(1, 16000))
        parts.append(stream.feed(clip[start : start + size]))
        start += size
    parts.append(stream.finish())
    return SpeechTokens(
        np.concatenate([part.linguistic for part in parts]), np.concatenate([part.semantic for part in parts])
    )


def _different(first: list[SpeechTokens], second: list[SpeechTokens], stream: int) -> int:
    """Ids that differ; other lengths are a mistake of the program."""
    pairs = zip(first, second, strict=True)
    return sum(int(np.sum(_stream(one, stream) != _stream(other, stream))) for one, other in pairs)


def _stream(tokens: SpeechTokens, stream: int) -> np.ndarray:
    return tokens.semantic if stream else tokens.linguistic


if __name__ == "__main__":
    main()
