"""Speech tokenisation in times real time, and how soon a stream answers.

    .venv/bin/python benchmarks/tokenization.py [--size small] [--json FILE.json]

The same weights (random, of the released sizes unless --size small; what they are does not change the time) run in the
packages that StepFun's code calls one file at a time, and here one by one, in batches, in bf16 and as a stream (whose
figures --json puts into FILE.stream.json). Codes
are frames of the encoders themselves, so that choices among them are close: shares of equal ids are lower bounds.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reporting import parser, report
from stepfun_tokenization import OneFileAtATime
from torch import Tensor

from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens
from stepaudio_train.tokenizers.streaming import SpeechStream

_STREAM_PIECE_TOKENS, _STREAM_CONTEXT_TOKENS = 6, 50
_CHUNK_SAMPLES = 3840


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--tokenizer", type=Path, help="directory of a speech tokenizer, instead of random weights")
    options.add_argument("--size", default="released", choices=("released", "small"), help="of random weights")
    options.add_argument("--audio-s", type=float, default=90.0, help="audio in all, in clips of 2 to 12 s")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where this project's rows run")
    chosen = options.parse_args()
    torch.manual_seed(0)
    clips = _clips(chosen.audio_s)
    if chosen.tokenizer:
        loaded = SpeechTokenizer.from_directory(chosen.tokenizer, "cpu")
        linguistic, semantic = loaded.linguistic, loaded.semantic
    else:
        linguistic, semantic = random_tokenizers(chosen.size, clips)
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(linguistic, semantic, clips, Path(folder), chosen.device)
    report(f"Tokenisation, {len(clips)} clips, {sum(map(len, clips)) / 16000:.0f} s", rows, chosen.json)
    tokenizer = SpeechTokenizer(linguistic, semantic, chosen.device)
    streams = [_stream(tokenizer, precision) for precision in ("fp32", "bf16")]
    beside = chosen.json.with_suffix(".stream.json") if chosen.json else None
    report("Streaming, chunks of 240 ms", streams, beside)


def _clips(audio_s: float) -> list[Tensor]:
    lengths: list[int] = []
    rng = np.random.default_rng(0)
    while sum(lengths) < audio_s * 16000:
        lengths.append(int(rng.uniform(2.0, 12.0) * 16000))
    return [speech_like(length, seed) for seed, length in enumerate(lengths)]


@torch.inference_mode()
def random_tokenizers(size: str, clips: Sequence[Tensor]) -> tuple[LinguisticTokenizer, SemanticTokenizer]:
    """Untrained tokenizers whose codes are frames that they make of `clips`."""
    released = size == "released"
    linguistic = LinguisticTokenizer(LinguisticConfig.released() if released else LinguisticConfig()).eval()
    semantic = SemanticTokenizer(SemanticConfig.released() if released else SemanticConfig()).eval()
    linguistic.cmvn_shift.fill_(8.0)
    linguistic.cmvn_scale.fill_(0.25)
    for clip in clips:
        waveform, length = clip[None], torch.tensor([len(clip)])
        frames, _ = linguistic.encode_features(*linguistic.features(waveform, length))
        _draw(linguistic.centroids, frames[0])
        frames, _ = semantic.encode_features(*semantic.features(waveform, length))
        _draw(semantic.quantizer.codes, F.normalize(frames[0], dim=-1))
    return linguistic, semantic


def _draw(codes: Tensor, frames: Tensor) -> None:
    """Put some of the frames at random places among the codes."""
    chosen = frames[torch.randperm(len(frames))[: max(1, len(frames) // 2)]]
    codes[torch.randperm(len(codes))[: len(chosen)]] = chosen[: len(codes)]


def _measure(
    linguistic: LinguisticTokenizer, semantic: SemanticTokenizer, clips: list[Tensor], folder: Path, device: str
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    wanted: list[SpeechTokens] = []

    def row(name: str, encode: Callable[[], list[SpeechTokens]]) -> None:
        encode_s, tokens = _timed(encode)
        if not wanted:
            wanted.extend(tokens)
        speed = sum(map(len, clips)) / 16000 / encode_s
        shares = {
            f"equal {stream} ids %": 100
            * _equal([t[at] for t in map(_streams, tokens)], [t[at] for t in map(_streams, wanted)])
            for at, stream in enumerate(("linguistic", "semantic"))
        }
        first = rows[0]["times real time"] if rows else speed
        rows.append({"way": name, "times real time": speed, "against the first": speed / first} | shares)

    for threads, name in ((1, "StepFun's way"), (torch.get_num_threads(), "the same, ONNX Runtime on all cores")):
        baseline = OneFileAtATime(linguistic, semantic, folder, threads)
        row(name, lambda baseline=baseline: [baseline.encode(clip) for clip in clips])
    for precision in ("fp32", "bf16"):
        tokenizer = SpeechTokenizer(*copy.deepcopy((linguistic, semantic)), device, precision)
        row(f"one by one, {precision}", lambda t=tokenizer: [t.encode([clip])[0] for clip in clips])
        row(f"in batches, {precision}", lambda t=tokenizer: t.encode(clips))
    return rows


def _timed(encode: Callable[[], list[SpeechTokens]]) -> tuple[float, list[SpeechTokens]]:
    """The faster of two rounds: the first one also sets up what is kept."""
    durations_s = []
    for _ in range(2):
        start_s = time.perf_counter()
        tokens = encode()
        durations_s.append(time.perf_counter() - start_s)
    return min(durations_s), tokens


def _streams(tokens: SpeechTokens) -> tuple[np.ndarray, np.ndarray]:
    return tokens.linguistic, tokens.semantic


def _equal(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Share of equal ids; streams of other lengths are a mistake of the program."""
    return float(np.mean(np.concatenate(found) == np.concatenate(wanted)))


def _stream(tokenizer: SpeechTokenizer, precision: str) -> dict[str, Any]:
    parts = copy.deepcopy((tokenizer.linguistic, tokenizer.semantic))
    rule = SpeechTokenizer(*parts, str(tokenizer.device), precision).with_pieces(
        _STREAM_PIECE_TOKENS, _STREAM_CONTEXT_TOKENS
    )
    stream = SpeechStream(rule)
    durations_ms = []
    for chunk in speech_like(60 * _CHUNK_SAMPLES).split(_CHUNK_SAMPLES):
        start_s = time.perf_counter()
        stream.feed(chunk)
        durations_ms.append(1000 * (time.perf_counter() - start_s))
    steady = durations_ms[20:]
    return {
        "precision": precision,
        "ms a chunk, median": float(np.median(steady)),
        "95th percentile": float(np.percentile(steady, 95)),
        "first chunk": durations_ms[0],
        "semantic pieces, context": f"{_STREAM_PIECE_TOKENS} tokens, {_STREAM_CONTEXT_TOKENS}",
    }


if __name__ == "__main__":
    main()
