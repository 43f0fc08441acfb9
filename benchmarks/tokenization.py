"""Speech tokenisation in times real time.

    .venv/bin/python benchmarks/tokenization.py [--tokenizer runs/tokenizer] [--json FILE]

Without --tokenizer: untrained tokenizers of the default and of the released size; weights do not change the time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from reporting import parser, report

from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer

_RELEASED = (
    LinguisticConfig(hidden_size=512, num_heads=4, ffn_size=2048, num_blocks=50, codebook_size=1024),
    SemanticConfig(num_mel_bins=128, hidden_size=1280, num_heads=20, num_blocks=6, codebook_size=4096),
)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--tokenizer", type=Path, help="run directory of `stepaudio run tokenizer`")
    options.add_argument("--clip-s", type=float, default=5.0, help="length of a clip")
    options.add_argument("--batch-s", type=float, default=60.0, help="audio of a batch")
    options.add_argument("--audio-s", type=float, default=120.0, help="audio in all")
    options.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    chosen = options.parse_args()
    if chosen.tokenizer:
        tokenizers = {str(chosen.tokenizer): SpeechTokenizer.from_directory(chosen.tokenizer, chosen.device)}
    else:
        sizes = {"default size": (LinguisticConfig(), SemanticConfig()), "released size": _RELEASED}
        tokenizers = {
            name: SpeechTokenizer(LinguisticTokenizer(first), SemanticTokenizer(second), chosen.device)
            for name, (first, second) in sizes.items()
        }
    rows = [
        _measure(name, tokenizer, clips, chosen.clip_s, chosen.audio_s)
        for name, tokenizer in tokenizers.items()
        for clips in sorted({1, max(1, round(chosen.batch_s / chosen.clip_s))})
    ]
    report(f"Tokenisation, clips of {chosen.clip_s:g} s", rows, chosen.json)


@torch.inference_mode()
def _measure(name: str, tokenizer: SpeechTokenizer, clips: int, clip_s: float, audio_s: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    length = round(clip_s * tokenizer.sample_rate_hz)
    batch = [0.1 * torch.randn(length, generator=generator) for _ in range(clips)]
    tokenizer.encode(batch)  # what happens once
    rounds = max(1, round(audio_s / (clips * clip_s)))
    start = time.perf_counter()
    for _ in range(rounds):
        tokenizer.encode(batch)
    duration_s = time.perf_counter() - start
    parameters = sum(p.numel() for part in (tokenizer.linguistic, tokenizer.semantic) for p in part.parameters())
    return {
        "tokenizer": name,
        "parameters": parameters,
        "clips a batch": clips,
        "times real time": rounds * clips * clip_s / duration_s,
    }


if __name__ == "__main__":
    main()
