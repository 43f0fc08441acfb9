"""Token shards on Megatron-Energon: what is read, how it becomes rows, and what happens to damaged samples.

    TokenShards -> cook -> repeat -> TokenBlend -> FullRows      one stream: an endless, deterministic sequence of rows

Energon divides the data over the streams, shuffles it, runs loader processes and keeps the state; the blend by tokens,
the packing and the tolerance for damage are ours.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    CrudeWebdataset,
    Sample,
    SavableDataLoader,
    SkipSample,
    WorkerConfig,
    basic_sample_keys,
    get_savable_loader,
)
from megatron.energon.edataclass import edataclass
from megatron.energon.epathlib import EPath
from megatron.energon.errors import FatalSampleError, reraise_exception
from megatron.energon.flavors import SavableDataset
from megatron.energon.flavors.base_dataset import add_sample_restore_key
from megatron.energon.wrappers import MapDataset, PackingDataset, RepeatDataset
from megatron.energon.wrappers.base import BaseWrapperDataset

from stepaudio_train.config.schema import BlendEntry
from stepaudio_train.data.packing import Document, choose_row
from stepaudio_train.data.records import RecordError
from stepaudio_train.data.render import Renderer, RenderError
from stepaudio_train.data.shard_reader import ShardReader
from stepaudio_train.data.token_shards import TokenSampleError, decode_token_sample

log = logging.getLogger(__name__)

SAMPLES_IN_A_ROW = 32
"""Samples that are read one after the other within a shard, before another place is chosen at random."""

_NAMED_SKIPS = 10


@dataclass(frozen=True)
class CheckedEntry:
    """A blend entry that can be used."""

    name: str
    entry: BlendEntry
    shard_counts: dict[str, int]
    """Shard -> samples."""


class SkipLog:
    """Counts what is left out, names the first few samples, and gives up when nothing else comes."""

    def __init__(self, patience: int) -> None:
        """Args: patience: samples left out in a row, after which there is no hope of a good one."""
        self.counts: Counter[str] = Counter()
        """Reason -> times that a sample was left out in this process."""
        self._named: dict[str, set[str]] = defaultdict(set)
        self._patience = patience
        self._in_a_row = 0

    def good(self) -> None:
        """A sample was used."""
        self._in_a_row = 0

    def skip(self, reason: str, sample: str, detail: str, level: int = logging.WARNING) -> None:
        """Count a sample that is left out.

        Raises:
            FatalSampleError: no sample could be used for a long time.
        """
        self.counts[reason] += 1
        named = self._named[reason]
        if len(named) < _NAMED_SKIPS and sample not in named:
            named.add(sample)
            log.log(level, "left out (%s): %s: %s", reason, sample, detail)
        elif self.counts[reason] % 10_000 == 0:
            log.log(level, "left out (%s): %d times so far, the last one %s", reason, self.counts[reason], sample)
        self._in_a_row += 1
        if self._in_a_row > self._patience:
            raise FatalSampleError(f"no usable sample among the last {self._in_a_row}; the last is {sample}: {detail}")


@edataclass
class DocumentSample(Sample):
    """A rendered document on its way into a row."""

    document: Document


@edataclass
class RowSample(Sample):
    """The documents of a row. Tensors are made of them in the training process: these travel faster."""

    documents: list[Document]


class TokenShards(CrudeWebdataset):
    """A dataset of token samples, as bytes."""

    def __init__(self, path: Path, skips: SkipLog, **options: Any) -> None:
        super().__init__(EPath(str(path.resolve())), decoder=None, split_part="train", training=True, **options)
        self._skips = skips

    def _on_damage(self, sample: str, detail: str) -> None:
        self._skips.skip("damaged", sample, detail)

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset[Any]:
        dataset = super().build(worker_rotation_offset)
        names = [(Path(str(shard.path)), shard.count) for shard in self.shards]
        dataset.dataset.join_readers = [ShardReader(names, self._on_damage)]
        return dataset


class TokenBlend(BaseWrapperDataset[DocumentSample, DocumentSample]):
    """Blends endless datasets by tokens: the next sample is from the one that is furthest behind its share.

    So at any moment the tokens drawn are as asked, to within a document, however long the documents of each dataset
    are. (Energon's own blend draws at random, by samples.)
    """

    _savable_fields = ("_num_tokens",)

    def __init__(
        self, weighted: Sequence[tuple[SavableDataset[DocumentSample], float]], worker_config: WorkerConfig
    ) -> None:
        super().__init__([dataset for dataset, _ in weighted], worker_config=worker_config)
        self._weights = [weight for _, weight in weighted]
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._num_tokens = [0] * len(self._weights)

    def len_worker(self, worker_idx: int | None = None) -> int:
        return sum(dataset.len_worker(worker_idx) for dataset in self.datasets)

    def __iter__(self) -> Iterator[DocumentSample]:
        sources = [iter(dataset) for dataset in self.datasets]
        while True:
            behind = min(range(len(sources)), key=lambda i: self._num_tokens[i] / self._weights[i])
            sample = next(sources[behind])
            self._num_tokens[behind] += sample.document.ids.size
            yield add_sample_restore_key(sample, behind, src=self) if len(sources) > 1 else sample

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "weights": self._weights}


class FullRows(PackingDataset):
    """Packing one row at a time out of a buffer that is always full.

    Energon's own packs the whole buffer at once, so that the last rows are poorly filled, and orders rows by length.
    Here `pre_packer` gives the indices of the next row's samples.
    """

    def __iter__(self) -> Iterator[Any]:
        """Endless, as the source must be."""
        source = iter(self.dataset)
        waiting = self._reading_buffer
        waiting.worker_start()
        while True:
            while waiting.len_worker() < self.buffer_size:
                waiting.append(next(source))
            chosen = self.pre_packer(waiting.buffer)
            row = [waiting[index] for index in chosen]
            for index in reversed(chosen):
                waiting.pop(index)
            with self._final_packing_sample_index.ctx():
                packed = self.final_packer(row)
            yield packed


@dataclass(frozen=True)
class _RowMaker:
    """What happens to samples on their way into rows."""

    renderer: Renderer
    sequence_length: int
    skips: SkipLog

    def cook(self, crude: dict[str, Any], entry: BlendEntry) -> DocumentSample:
        """Stored sample -> rendered document."""
        where = f"{entry.path}/{crude['__shard__']}: {crude['__key__']}"
        try:
            sample = decode_token_sample(crude, where)
            document = self.renderer.render(sample, entry.task, entry.loss)
        except (RecordError, TokenSampleError) as error:
            self.skips.skip("damaged", where, str(error))
            raise SkipSample from error
        except RenderError as error:
            # Usual in mixed corpora, and no fault of the sample.
            self.skips.skip(f"no {entry.task}", where, str(error), logging.DEBUG)
            raise SkipSample from error
        if len(document) > self.sequence_length:
            detail = f"{len(document)} tokens do not fit training.sequence_length={self.sequence_length}"
            self.skips.skip("too long", where, detail)
            raise SkipSample
        self.skips.good()
        return DocumentSample(**basic_sample_keys(crude), document=document)

    def choose(self, samples: list[DocumentSample]) -> list[int]:
        """The samples of the next row."""
        return choose_row([sample.document.ids.size for sample in samples], self.sequence_length)


def _row(samples: list[DocumentSample]) -> RowSample:
    documents = [sample.document for sample in samples]
    return RowSample(__key__=samples[0].__key__, __restore_key__=(), documents=documents)


def build_stream(
    entries: Sequence[CheckedEntry],
    renderer: Renderer,
    sequence_length: int,
    buffer_samples: int,
    seed: int,
    stream: int,
    num_streams: int,
    num_workers: int,
    skips: SkipLog,
) -> SavableDataLoader[RowSample]:
    """The loader of one stream's rows."""
    make = _RowMaker(renderer, sequence_length, skips)
    workers = WorkerConfig(
        rank=stream,
        world_size=num_streams,
        num_workers=num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,
    )
    weighted = []
    for checked in entries:
        # Two entries on one path must not meet the same recordings at the same time.
        own = replace(workers, seed_offset=zlib.crc32(f"{seed}|{checked.name}".encode()))
        shards = TokenShards(
            Path(checked.entry.path), skips, worker_config=own, max_samples_per_sequence=SAMPLES_IN_A_ROW
        )
        cook = functools.partial(make.cook, entry=checked.entry)
        documents = MapDataset(shards.build(), cook, stateless_map_fn=True, worker_config=workers)
        weighted.append((RepeatDataset(documents, worker_config=workers), checked.entry.weight))
    blend = TokenBlend(weighted, workers)
    rows = FullRows(blend, buffer_samples, make.choose, _row, worker_config=workers)
    # In the training process the garbage collector and a watchdog thread are not the loader's business.
    options: dict[str, Any] = {} if num_workers else {"gc_collect_every_n_steps": 0}
    loader = get_savable_loader(rows, watchdog_timeout_seconds=None, **options)
    loader.pin_memory = False
    # Its own, so that starting a stream does not draw from the training's generator.
    loader.generator = torch.Generator()
    return loader
