"""`stepaudio bench loader`: tokens/s and packing fill, on speech of made-up lengths and on token shards.

Fill is the share of a row that is no padding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepaudio_train.commands.bench.cases import document_tokens, num_groups, require_positive, speech_durations_s
from stepaudio_train.commands.bench.reporting import report
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import BlendEntry, DataConfig, Task
from stepaudio_train.data.loader import build_train_loader
from stepaudio_train.data.packing import choose_rows
from stepaudio_train.data.records import AudioPart, speech_record
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.shards import ShardSample, finish_dataset, shard_name, write_shard
from stepaudio_train.data.token_shards import STATS_FILE, TokenStats, encode_token_sample, file_sha256
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.text import TextTokenizer, train_text_tokenizer
from stepaudio_train.tokenizers.vocabulary import PAD_ID, Vocabulary

_TEXT_SIZE = 400
_MADE_SHARDS, _SAMPLES_PER_SHARD = 4, 250


@dataclass(frozen=True)
class LoaderOptions:
    """What `stepaudio bench loader` takes."""

    shards: Path | None = None
    """Folder written by `stepaudio tokenize`; None: one with random codes is made first."""
    text_tokenizer: Path | None = None
    """Needed with `shards`."""
    sequence_length: int = 4096
    rows: int = 8
    """Of a batch."""
    batches: int = 40
    """That are timed."""
    json: Path | None = None


def bench_loader(options: LoaderOptions) -> int:
    """Print and write the table; the exit status.

    Raises:
        UserError: shards without their text tokenizer, or nothing to time.
    """
    require_positive(sequence_length=options.sequence_length, rows=options.rows, batches=options.batches)
    if options.shards and not options.text_tokenizer:
        raise UserError("--shards: needs the text tokenizer of the shards; type --text-tokenizer FILE")
    layout = (options.sequence_length, options.rows)
    rows = [_packing(buffer, options.sequence_length) for buffer in (64, 512, 4096)]
    with tempfile.TemporaryDirectory() as folder:
        shards, tokenizer = options.shards, options.text_tokenizer
        if shards is None or tokenizer is None:
            shards, tokenizer = Path(folder, "shards"), Path(folder, "text.model")
            _make_shards(shards, tokenizer)
        vocabulary = Vocabulary(TextTokenizer.from_file(tokenizer).size)
        rows.append(_loading("made-up tokens", DataConfig(), layout, options.batches, vocabulary, None))
        tasks: tuple[Task, ...] = ("asr", "tts", "continuation")
        blend = {task: BlendEntry(task=task, path=str(shards)) for task in tasks}
        config = DataConfig(source="shards", blend=blend, num_streams=2)
        for workers in (0, 1):
            name = f"token shards, {workers * config.num_streams} worker(s)"
            rows.append(
                _loading(name, replace(config, num_workers=workers), layout, options.batches, vocabulary, tokenizer)
            )
    report(f"Loading, rows of {options.sequence_length} tokens", rows, options.json)
    return 0


def _packing(buffer_samples: int, sequence_length: int) -> dict[str, Any]:
    """The choice of documents for rows alone."""
    lengths = [document_tokens(duration_s) for duration_s in speech_durations_s(buffer_samples)]
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
        tokens += int((loader.next_batch().input_ids != PAD_ID).sum())
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
    for number, duration_s in enumerate(speech_durations_s(_SAMPLES_PER_SHARD, seed=shard)):
        groups = num_groups(duration_s)
        codes = SpeechTokens(
            random.integers(0, 1024, 2 * groups, np.int32), random.integers(0, 4096, 3 * groups, np.int32)
        )
        record = speech_record(f"{shard}_{number}", AudioPart("0", text="one two three", duration_s=float(duration_s)))
        sample = TokenSample(record, {"0": codes})
        stats.add(sample, renderer)
        yield encode_token_sample(sample)
