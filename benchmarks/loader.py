"""Loader tokens/s and packing fill, on speech of made-up lengths and on token shards.

    .venv/bin/python benchmarks/loader.py [--sequence-length 8192] [--json FILE]
    .venv/bin/python benchmarks/loader.py --shards corpora/tokens/train --text-tokenizer runs/tokenizer/text.model

Without --shards, a folder of shards with random codes is written first. Fill is the share of a row that is no padding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from reporting import parser, report

from stepaudio_train.config.schema import BlendEntry, DataConfig
from stepaudio_train.data.loader import build_train_loader
from stepaudio_train.data.packing import choose_rows
from stepaudio_train.data.records import AudioPart, speech_record
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.shards import ShardSample, finish_dataset, shard_name, write_shard
from stepaudio_train.data.token_shards import STATS_FILE, TokenStats, encode_token_sample, file_sha256
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.text import TextTokenizer, train_text_tokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary

_MEDIAN_S, _SPREAD, _LONGEST_S = 6.0, 0.7, 30.0
"""Durations are log-normal, as those of segmented speech are, and cut at the longest."""
_TEXT_SIZE = 400
_MADE_SHARDS, _SAMPLES_PER_SHARD = 4, 250


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--shards", type=Path, help="folder written by `stepaudio tokenize`")
    options.add_argument("--text-tokenizer", type=Path, help="needed with --shards")
    options.add_argument("--sequence-length", type=int, default=4096, help="tokens of a row")
    options.add_argument("--rows", type=int, default=8, help="rows of a batch")
    options.add_argument("--batches", type=int, default=40, help="batches that are timed")
    chosen = options.parse_args()
    if chosen.shards and not chosen.text_tokenizer:
        options.error("--shards needs --text-tokenizer FILE")
    layout = (chosen.sequence_length, chosen.rows)
    rows = [_packing(buffer, chosen.sequence_length) for buffer in (64, 512, 4096)]
    with tempfile.TemporaryDirectory() as folder:
        shards, tokenizer = chosen.shards, chosen.text_tokenizer
        if shards is None:
            shards, tokenizer = Path(folder, "shards"), Path(folder, "text.model")
            _make_shards(shards, tokenizer)
        vocabulary = Vocabulary(TextTokenizer.from_file(tokenizer).size)
        rows.append(_loading("made-up tokens", DataConfig(), layout, chosen.batches, vocabulary, None))
        blend = {task: BlendEntry(task=task, path=str(shards)) for task in ("asr", "tts", "continuation")}
        config = DataConfig(source="shards", blend=blend, num_streams=2)
        for workers in (0, 1):
            name = f"token shards, {workers * config.num_streams} worker(s)"
            rows.append(
                _loading(name, replace(config, num_workers=workers), layout, chosen.batches, vocabulary, tokenizer)
            )
    report(f"Loading, rows of {chosen.sequence_length} tokens", rows, chosen.json)


def _packing(buffer_samples: int, sequence_length: int) -> dict[str, Any]:
    """The choice of documents for rows alone."""
    lengths = [5 * _num_groups(duration_s) + 6 for duration_s in _durations(buffer_samples, seed=0)]
    usable = [length for length in lengths if length <= sequence_length]
    start = time.perf_counter()
    chosen = choose_rows(usable, sequence_length)
    duration_s = time.perf_counter() - start
    # The last row is what a stream would carry over into the next buffer.
    full = [sum(usable[i] for i in row) for row in chosen]
    fill = sum(sorted(full)[1:]) / (sequence_length * max(1, len(full) - 1))
    return {"what": f"packing, {buffer_samples} samples", "tokens/s": sum(usable) / duration_s, "fill %": 100 * fill}


def _loading(
    name: str,
    config: DataConfig,
    layout: tuple[int, int],
    batches: int,
    vocabulary: Vocabulary,
    text_tokenizer: Path | None,
) -> dict[str, Any]:
    loader = build_train_loader(config, vocabulary, *layout, seed=0, text_tokenizer=text_tokenizer)
    loader.next_batch()  # workers start, files open
    tokens, start = 0, time.perf_counter()
    for _ in range(batches):
        tokens += int((loader.next_batch().input_ids != 0).sum())
    duration_s = time.perf_counter() - start
    loader.close()
    return {"what": name, "tokens/s": tokens / duration_s, "fill %": 100 * tokens / (batches * layout[0] * layout[1])}


def _make_shards(folder: Path, text_tokenizer: Path) -> None:
    """Shards of recordings that nobody made: lengths as speech has them, random codes."""
    train_text_tokenizer(["one two three", "four five six"], _TEXT_SIZE, text_tokenizer)
    folder.mkdir()
    renderer = Renderer(Vocabulary(_TEXT_SIZE), TextTokenizer.from_file(text_tokenizer))
    stats = TokenStats(text_tokenizer_sha256=file_sha256(text_tokenizer))
    names = [shard_name(number) for number in range(_MADE_SHARDS)]
    counts = {name: write_shard(folder / name, _made_samples(n, renderer, stats)) for n, name in enumerate(names)}
    finish_dataset(folder, counts)
    stats.save(folder / STATS_FILE)


def _made_samples(shard: int, renderer: Renderer, stats: TokenStats) -> Iterator[ShardSample]:
    random = np.random.default_rng(shard)
    for number, duration_s in enumerate(_durations(_SAMPLES_PER_SHARD, seed=shard)):
        groups = _num_groups(duration_s)
        codes = SpeechTokens(
            random.integers(0, 1024, 2 * groups, np.int32), random.integers(0, 4096, 3 * groups, np.int32)
        )
        record = speech_record(f"{shard}_{number}", AudioPart("0", text="one two three", duration_s=float(duration_s)))
        sample = TokenSample(record, {"0": codes})
        stats.add(sample, renderer)
        yield encode_token_sample(sample)


def _durations(count: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(np.log(_MEDIAN_S), _SPREAD, count)
    return np.clip(drawn, 0.5, _LONGEST_S)


def _num_groups(duration_s: float) -> int:
    return int(duration_s / 0.12)


if __name__ == "__main__":
    main()
