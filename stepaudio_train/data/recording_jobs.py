"""Recordings from whatever holds them, cut into jobs that any process can do by itself, in any order.

A job is a small frozen dataclass: it says where its recordings are, is sent to a worker, and reads them there.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from stepaudio_train.audio import AudioError, read_audio
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.records import (
    AudioPart,
    Record,
    RecordError,
    parse_record,
    speech_record,
    with_audio_parts,
)
from stepaudio_train.data.shards import ShardError, ShardSample, read_shard
from stepaudio_train.data.sources import AUDIO_SUFFIXES, find_recordings

if TYPE_CHECKING:
    from datasets import Dataset

RECORDINGS_PER_SHARD = 512
"""Of sources that are not cut into shards themselves."""
HUB_PREFIX = "hf:"
TEXT_FIELDS = ("text", "transcript", "transcription", "sentence", "normalized_text")
_SAVED_DATASET_FILES = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Refused:
    """A sample of the source that is left out."""

    reason: str


@dataclass(frozen=True)
class Recording:
    """A record, and the waveforms [samples] of its audio parts by their names in it."""

    record: Record
    waveforms: Mapping[str, Tensor]


class RecordingJob(Protocol):
    """What one output shard is made of."""

    def recordings(self, sample_rate_hz: int) -> Iterator[Recording | Refused]:
        """Read them, in order; what cannot be used is named."""


@dataclass(frozen=True)
class TarJob:
    """One tar: of `stepaudio prepare`, or any WebDataset with an audio member, and a text or JSON beside it."""

    path: Path

    def recordings(self, sample_rate_hz: int) -> Iterator[Recording | Refused]:
        number = 0
        try:
            for stored in read_shard(self.path):
                number += 1
                where = f"{self.path}: {stored.key}"
                try:
                    record, audio = _of_tar(stored, where)
                    yield _read(record, audio, sample_rate_hz, where)
                except (RecordError, AudioError) as error:
                    yield Refused(str(error))
        except ShardError as error:
            yield Refused(f"{error}; the {number} samples before that are used")


@dataclass(frozen=True)
class FilesJob:
    """Some of the recordings of a folder or a manifest: records whose audio parts hold paths."""

    records: tuple[Record, ...]

    def recordings(self, sample_rate_hz: int) -> Iterator[Recording | Refused]:
        for record in self.records:
            try:
                paths = {str(place): part.audio for place, part in enumerate(record.audio_parts())}
                parts = [replace(part, audio=name) for name, part in zip(paths, record.audio_parts(), strict=True)]
                yield _read(with_audio_parts(record, parts), paths, sample_rate_hz, record.id)
            except AudioError as error:
                yield Refused(str(error))


@dataclass(frozen=True)
class DatasetJob:
    """Some rows of a Hugging Face dataset: a folder of `save_to_disk`, Parquet files, or a name on the hub."""

    source: str
    start: int
    stop: int

    def recordings(self, sample_rate_hz: int) -> Iterator[Recording | Refused]:
        dataset = open_dataset(self.source)
        for number in range(self.start, self.stop):
            where = f"{self.source}: row {number}"
            row = dataset[number]
            audio = row["audio"]
            content = audio["bytes"] or audio["path"]
            if content is None:
                yield Refused(f"{where}: its audio is empty")
                continue
            record = _record_of_fields(str(row.get("id") or f"{number:09d}"), row)
            try:
                yield _read(record, {"0": content}, sample_rate_hz, where)
            except AudioError as error:
                yield Refused(str(error))


def is_dataset(source: Path) -> bool:
    """Whether `DatasetJob` reads it."""
    if str(source).startswith(HUB_PREFIX) or source.suffix == ".parquet":
        return True
    return source.is_dir() and bool(
        any((source / name).is_file() for name in _SAVED_DATASET_FILES) or list(source.glob("*.parquet"))
    )


@lru_cache(maxsize=1)
def open_dataset(source: str) -> Dataset:
    """A dataset whose column `audio` holds undecoded files; opened once a process.

    Raises:
        UserError: as `load_dataset`, or it has no column `audio`.
    """
    dataset = load_dataset(source)
    if "audio" not in dataset.column_names:
        raise UserError(f"{source}: has no column `audio`, but {', '.join(dataset.column_names)}")
    import datasets

    return dataset.cast_column("audio", datasets.Audio(decode=False))


def load_dataset(source: str) -> Dataset:
    """A dataset as it is.

    Args:
        source: a path, or hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT (the split is `train` if not given).

    Raises:
        UserError: the library is missing, or the dataset cannot be read.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"{source}: Hugging Face datasets need a package; type: pip install 'stepaudio-train[datasets]'"
        ) from None
    path = Path(source)
    try:
        if source.startswith(HUB_PREFIX):
            name, *rest = source.removeprefix(HUB_PREFIX).split(":")
            return datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else "train")
        if path.suffix == ".parquet" or list(path.glob("*.parquet")):
            files = [str(path)] if path.is_file() else [str(file) for file in sorted(path.glob("*.parquet"))]
            return datasets.load_dataset("parquet", data_files=files, split="train")
        dataset = datasets.load_from_disk(source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source}: cannot be read as a dataset: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        raise UserError(f"{source}: has splits; give one of them: {', '.join(f'{source}/{name}' for name in dataset)}")
    return dataset


def recording_jobs(source: Path) -> tuple[list[RecordingJob], list[Refused]]:
    """The jobs of a source without splits, and what is refused at once.

    Raises:
        UserError: nothing usable in it.
    """
    if is_dataset(source):
        size = len(open_dataset(str(source)))
        starts = range(0, size, RECORDINGS_PER_SHARD)
        return [DatasetJob(str(source), n, min(n + RECORDINGS_PER_SHARD, size)) for n in starts], []
    tars = [source] if source.suffix == ".tar" else sorted(source.glob("*.tar")) if source.is_dir() else []
    if tars:
        return [TarJob(path) for path in tars], []
    found = find_recordings(source, allow_untranscribed=True)
    records = found.records
    jobs = [
        FilesJob(tuple(records[n : n + RECORDINGS_PER_SHARD])) for n in range(0, len(records), RECORDINGS_PER_SHARD)
    ]
    return list(jobs), [Refused(f"{refusal.name}: {refusal.reason}") for refusal in found.refusals]


def _read(record: Record, audio: Mapping[str, bytes | str], sample_rate_hz: int, where: str) -> Recording:
    waveforms = {}
    for name, content in audio.items():
        if isinstance(content, bytes):
            waveforms[name] = read_audio(io.BytesIO(content), sample_rate_hz, where)
        else:
            waveforms[name] = read_audio(content, sample_rate_hz)
    parts = [replace(part, duration_s=len(waveforms[part.audio]) / sample_rate_hz) for part in record.audio_parts()]
    return Recording(with_audio_parts(record, parts), waveforms)


def _of_tar(stored: ShardSample, where: str) -> tuple[Record, dict[str, bytes]]:
    """The record of a sample, its audio parts named, and their files."""
    fields = _json(stored.members.get("json", b"{}"), where)
    if "messages" not in fields:
        return _of_foreign_tar(stored, fields, where)
    record = parse_record(stored.members["json"], where)
    parts, audio = [], {}
    for part in record.audio_parts():
        if part.audio not in stored.members:
            raise RecordError(f"{where}: its record names {part.audio!r}, and there is no such member")
        name = part.audio.removesuffix("flac").rstrip(".") or "0"
        audio[name] = stored.members[part.audio]
        parts.append(replace(part, audio=name))
    if not parts:
        raise RecordError(f"{where}: its record holds no audio")
    return with_audio_parts(record, parts), audio


def _of_foreign_tar(stored: ShardSample, fields: dict[str, Any], where: str) -> tuple[Record, dict[str, bytes]]:
    endings = [ending for ending in stored.members if f".{ending.rpartition('.')[2].lower()}" in AUDIO_SUFFIXES]
    if len(endings) != 1:
        raise RecordError(f"{where}: has {len(endings)} audio members, not one, and no record that names them")
    if "txt" in stored.members:
        fields = {"text": stored.members["txt"].decode("utf-8", errors="replace"), **fields}
    return _record_of_fields(stored.key, fields), {"0": stored.members[endings[0]]}


def _record_of_fields(id: str, fields: Mapping[str, Any]) -> Record:
    text = next((str(fields[name]) for name in TEXT_FIELDS if fields.get(name)), "")
    speaker, language = (str(fields[name]) if fields.get(name) else None for name in ("speaker", "language"))
    part = AudioPart("0", text=re.sub(r"\s+", " ", text).strip() or None, speaker=speaker, language=language)
    return speech_record(id, part)


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{where}: its JSON cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise RecordError(f"{where}: its JSON is no object")
    return fields
