"""Batches from token shards: the same global batches at any data-parallel size, and exact resume.

The global batch is made of `data.num_streams` streams, one behind the other; each data-parallel rank owns an equal run
of them. A stream's rows depend on the seed and the stream alone, so the layout of the ranks changes nothing, and a
checkpoint, which holds one file for each stream, loads at any data-parallel size that divides the streams.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.energon import SavableDataLoader

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import DataConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.blend import check_blend
from stepaudio_train.data.energon import CheckedEntry, RowSample, SkipLog, build_stream
from stepaudio_train.data.energon_state import state_from_json, state_to_json
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.packing import Document, choose_rows, pack_rows
from stepaudio_train.data.records import RecordError
from stepaudio_train.data.render import Renderer, RenderError
from stepaudio_train.data.shards import ShardError
from stepaudio_train.data.token_shards import TokenSampleError, file_sha256, read_token_samples
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary


class ShardLoader:
    """Batches of a blend of token shards. See `data.loader.TrainLoader`."""

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        sequence_length: int,
        rows_per_step: int,
        seed: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        text_tokenizer: Path | None,
    ) -> None:
        problems = _layout_problems(config, rows_per_step, data_parallel_size)
        self._renderer, self._entries = _blend(config, vocabulary, sequence_length, text_tokenizer, problems)
        smallest = min(sum(e.shard_counts.values()) for e in self._entries)
        if smallest < config.num_streams * max(1, config.num_workers):
            raise ConfigError(
                [
                    f"data.num_streams={config.num_streams}: every stream needs samples of its own, and one dataset of "
                    f"the blend has only {smallest}; type data.num_streams={smallest} or less"
                ]
            )
        self._config, self._sequence_length, self._seed = config, sequence_length, seed
        streams_per_rank = config.num_streams // data_parallel_size
        self._streams = range(data_parallel_rank * streams_per_rank, (data_parallel_rank + 1) * streams_per_rank)
        self._rows_per_stream = rows_per_step // config.num_streams
        self._loaders: dict[int, SavableDataLoader[RowSample]] = {}
        self._iterators: dict[int, Iterator[RowSample]] = {}
        # Twice through a small corpus finds its good samples, if there are any; a large one is not searched to its end.
        num_samples = sum(sum(e.shard_counts.values()) for e in self._entries)
        self._skips = SkipLog(patience=min(100_000, 1000 + 2 * num_samples))
        for stream in self._streams:
            self._open(stream)

    @property
    def num_skipped(self) -> Counter[str]:
        """Reason -> times that a sample was left out so far by this process (not by its worker processes)."""
        return self._skips.counts

    def next_batch(self) -> TokenBatch:
        """This data-parallel rank's rows of the next global batch."""
        rows = [self._next_row(stream) for stream in self._streams for _ in range(self._rows_per_stream)]
        return pack_rows(rows, self._sequence_length)

    def save(self, directory: Path) -> None:
        """Write one file for each of this rank's streams."""
        for stream, loader in self._loaders.items():
            content = {"made_by": self._fingerprint(), "state": state_to_json(loader.save_state_rank())}
            write_atomically(_state_file(directory, stream), json.dumps(content).encode())

    def load(self, directory: Path) -> None:
        """Go on from where `save` was called, bit for bit."""
        for stream in self._streams:
            path = _state_file(directory, stream)
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise ConfigError(
                    [f"data.num_streams={self._config.num_streams}: {directory} holds no state of stream {stream}"]
                ) from None
            self._require_same(content["made_by"], directory)
            self._open(stream)
            self._loaders[stream].restore_state_rank(state_from_json(content["state"]))

    def close(self) -> None:
        """End worker processes, if there are any."""
        if self._config.num_workers:
            for stream in self._iterators:
                # Torch has no public way, and takes five seconds a worker where it is left to the garbage collector.
                self._loaders[stream]._iterator._shutdown_workers()
        self._iterators.clear()
        self._loaders.clear()

    def _open(self, stream: int) -> None:
        config = self._config
        self._loaders[stream] = build_stream(
            self._entries,
            self._renderer,
            self._sequence_length,
            config.packing_buffer_samples,
            self._seed,
            stream,
            config.num_streams,
            config.num_workers,
            self._skips,
        )
        self._iterators.pop(stream, None)

    def _next_row(self, stream: int) -> list[Document]:
        # Not before the first row is wanted: a state can only be restored into a loader that has not begun.
        if stream not in self._iterators:
            self._iterators[stream] = iter(self._loaders[stream])
        return next(self._iterators[stream]).documents

    def _fingerprint(self) -> dict[str, Any]:
        """What the order of samples depends on, by the key that sets it."""
        config = self._config
        made_by: dict[str, Any] = {
            "training.seed": self._seed,
            "training.sequence_length": self._sequence_length,
            "data.num_streams": config.num_streams,
            "data.num_workers": config.num_workers,
            "data.packing_buffer_samples": config.packing_buffer_samples,
        }
        for e in self._entries:
            made_by[f"data.blend.{e.name}"] = [e.entry.task, e.entry.loss, e.entry.weight, e.shard_counts]
        return made_by

    def _require_same(self, made_by: dict[str, Any], directory: Path) -> None:
        now = self._fingerprint()
        changed = sorted(key for key in made_by.keys() | now.keys() if made_by.get(key) != now.get(key))
        if changed:
            raise ConfigError(
                [
                    f"{key}: is not what it was when {directory} was written, so its data order cannot go on; set it "
                    "back, or start another run from the weights with model.init"
                    for key in changed
                ]
            )


def validation_batches(
    config: DataConfig,
    vocabulary: Vocabulary,
    sequence_length: int,
    rows_per_step: int,
    num_batches: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    text_tokenizer: Path | None,
) -> list[TokenBatch]:
    """The first documents of each entry, up to its share of the tokens, packed once; the last rows may be padding."""
    problems: list[str] = []
    if rows_per_step % data_parallel_size:
        problems.append(
            f"training.global_batch_rows={rows_per_step}: must be a multiple of the data-parallel size, "
            f"{data_parallel_size}"
        )
    renderer, entries = _blend(config, vocabulary, sequence_length, text_tokenizer, problems)
    total_weight = sum(e.entry.weight for e in entries)
    documents = []
    for e in entries:
        budget = num_batches * rows_per_step * sequence_length * e.entry.weight / total_weight
        try:
            for sample in read_token_samples(Path(e.entry.path)):
                try:
                    document = renderer.render(sample, e.entry.task, e.entry.loss)
                except RenderError:
                    continue
                if len(document) <= sequence_length:
                    budget -= len(document)
                    if budget < 0:
                        break
                    documents.append(document)
        except (ShardError, RecordError, TokenSampleError) as error:
            raise ConfigError([f"validation.blend.{e.name}: {error}"]) from error
    rows = choose_rows([len(d) for d in documents], sequence_length)[: num_batches * rows_per_step]
    rows += [[]] * (-len(rows) % rows_per_step)
    own = rows_per_step // data_parallel_size
    starts = range(data_parallel_rank * own, len(rows), rows_per_step)
    return [pack_rows([[documents[i] for i in row] for row in rows[s : s + own]], sequence_length) for s in starts]


def _layout_problems(config: DataConfig, rows_per_step: int, data_parallel_size: int) -> list[str]:
    problems = []
    streams = config.num_streams
    if streams % data_parallel_size:
        problems.append(
            f"data.num_streams={streams}: must be a multiple of the data-parallel size, {data_parallel_size}; type "
            f"data.num_streams={-(-streams // data_parallel_size) * data_parallel_size}"
        )
    if rows_per_step % streams:
        problems.append(
            f"training.global_batch_rows={rows_per_step}: must be a multiple of data.num_streams={streams}; type "
            f"training.global_batch_rows={-(-rows_per_step // streams) * streams}"
        )
    return problems


def _blend(
    config: DataConfig,
    vocabulary: Vocabulary,
    sequence_length: int,
    text_tokenizer: Path | None,
    problems: list[str],
) -> tuple[Renderer, list[CheckedEntry]]:
    """The renderer and the usable entries; `problems` found before are told with those found here."""
    if text_tokenizer is None:
        problems.append("vocabulary.text_tokenizer: needed to encode text; type vocabulary.text_tokenizer=FILE.model")
        raise ConfigError(problems)
    tokenizer = TextTokenizer.from_file(text_tokenizer)
    usable, wrong = check_blend(config, sequence_length, file_sha256(text_tokenizer))
    problems += wrong
    # The released file lists audio pieces behind its text pieces; a small one has text pieces alone.
    if tokenizer.size > vocabulary.text_size and tokenizer.encode("<audio_0>") != [vocabulary.text_size]:
        problems.append(
            f"vocabulary.text_size={vocabulary.text_size}: {text_tokenizer} has {tokenizer.size} text ids; type "
            f"vocabulary.text_size={tokenizer.size}"
        )
    if problems:
        raise ConfigError(problems)
    entries = [CheckedEntry(name, config.blend[name], counts) for name, counts in usable.items()]
    return Renderer(vocabulary, tokenizer, config.speech_layout), entries


def _state_file(directory: Path, stream: int) -> Path:
    return directory / f"stream-{stream:05d}.json"
