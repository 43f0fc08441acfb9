"""`stepaudio prepare`: recordings and transcripts -> WebDataset tars of 16 kHz mono FLAC and records.

OUT/{train,validation,test,heldout_speaker}/shard-000000.tar ...   each folder a Megatron-Energon dataset
OUT/report.json, OUT/report.txt                                    what is in it, and what was refused and why
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio import AudioError, read_audio, resample
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.plan import Item, make_plan
from stepaudio_train.data.records import AudioPart, Record, Span, record_to_json, speech_record, with_audio_parts
from stepaudio_train.data.shards import ShardSample, finish_dataset, sample_key, shard_name, write_shard
from stepaudio_train.data.sources import Refusal, find_recordings

log = logging.getLogger(__name__)

SAMPLE_RATE_HZ = 16000
SHARD_SAMPLES = 256
_SILENT_PEAK = 1e-4
_PAUSE_S = 0.12
_NAMED_REFUSALS = 50
_ITEMS_PER_WORKER = 2000
"""A worker process takes about two seconds to start, and as long to prepare this many short recordings."""


@dataclass(frozen=True)
class PrepareOptions:
    """What `stepaudio prepare` is asked for."""

    source: Path
    """A folder of audio, or a manifest (.jsonl, .tsv, .csv)."""
    output: Path
    test_percent: int = 10
    validation_percent: int = 10
    heldout_speaker: str | None = None
    """All recordings of this speaker go to the split `heldout_speaker`."""
    min_duration_s: float = 0.1
    max_duration_s: float = 60.0
    join_max: int = 1
    """Training also gets records of 2 to join_max recordings of one speaker, one behind the other, with spans."""
    speed_copies: tuple[float, ...] = ()
    """Training also gets copies of everything at these speeds (0.9 is slower and lower)."""
    allow_untranscribed: bool = False
    num_workers: int | None = None
    """Processes; None takes as many as there are cores and work for."""


@dataclass(frozen=True)
class PrepareReport:
    """What was written, and what was not."""

    samples: dict[str, int]
    """Split -> records."""
    hours: dict[str, float]
    """Split -> hours of audio."""
    speakers: dict[str, list[str]]
    """Split -> speakers that are known by name."""
    refused: list[Refusal]

    def summary(self) -> str:
        """For people."""
        lines = [f"{'split':<18}{'records':>9}{'hours':>9}  speakers"]
        lines += [
            f"{split:<18}{count:>9}{self.hours[split]:>9.2f}  {', '.join(self.speakers[split][:8]) or '-'}"
            for split, count in self.samples.items()
        ]
        lines.append(f"{len(self.refused)} refused")
        lines += [f"  {r.name}: {r.reason}" for r in self.refused[:_NAMED_REFUSALS]]
        if len(self.refused) > _NAMED_REFUSALS:
            lines.append(f"  and {len(self.refused) - _NAMED_REFUSALS} more, all of them in report.json")
        return "\n".join(lines) + "\n"


def prepare(options: PrepareOptions) -> PrepareReport:
    """Write the dataset that `options` asks for. Called again, it goes on where it stopped, or returns the report.

    Raises:
        UserError: nothing usable in the source; an option that makes no sense; or an output folder that holds
            something else.
    """
    _check(options)
    found = find_recordings(options.source, options.allow_untranscribed)
    splits = make_plan(found.records, options)
    fingerprint = _fingerprint(options, found.records)
    finished = _begin(options.output, fingerprint)
    if finished is not None:
        log.info("%s: already prepared", options.output)
        return finished
    jobs = [
        (options.output / split / shard_name(number), items[start : start + SHARD_SAMPLES], options)
        for split, items in splits.items()
        for number, start in enumerate(range(0, len(items), SHARD_SAMPLES))
    ]
    results = _run(jobs, options.num_workers)
    report = _report(results, found.refusals)
    if not sum(report.samples.values()):
        raise UserError(f"{options.source}: every recording was refused:\n{report.summary()}")
    for split in report.samples:
        written = {path.name: result["samples"] for path, result in results if path.parent.name == split}
        finish_dataset(options.output / split, {name: count for name, count in written.items() if count})
    content = {"fingerprint": fingerprint, **asdict(report)}
    write_atomically(options.output / "report.txt", report.summary().encode())
    write_atomically(options.output / "report.json", json.dumps(content, indent=1, ensure_ascii=False).encode())
    return report


def _check(options: PrepareOptions) -> None:
    problems = []
    if options.test_percent < 0 or options.validation_percent < 0:
        problems.append("test and validation percent must not be negative")
    if options.test_percent + options.validation_percent >= 100:
        problems.append(
            f"{options.test_percent}% for test and {options.validation_percent}% for validation leave no training data"
        )
    if not 0 <= options.min_duration_s < options.max_duration_s:
        problems.append(f"durations from {options.min_duration_s} to {options.max_duration_s} s make no range")
    if options.join_max < 1:
        problems.append(f"join_max must be at least 1, got {options.join_max}")
    if any(not 0.5 <= speed <= 2.0 or speed == 1.0 for speed in options.speed_copies):
        problems.append(f"speeds must be from 0.5 to 2 and not 1, got {', '.join(map(str, options.speed_copies))}")
    if problems:
        raise UserError("; ".join(problems))


def _fingerprint(options: PrepareOptions, records: list[Record]) -> str:
    """Changes whenever what would be written changes."""
    asked = {k: str(v) for k, v in asdict(options).items() if k not in ("source", "output", "num_workers")}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for record in records:
        digest.update(json.dumps(record_to_json(record), sort_keys=True).encode())
        for part in record.audio_parts():
            path = Path(part.audio)
            version = f"{path.stat().st_size},{path.stat().st_mtime_ns}" if path.is_file() else "missing"
            digest.update(version.encode())
    return digest.hexdigest()


def _begin(output: Path, fingerprint: str) -> PrepareReport | None:
    """Claim the output folder for this work; the report if the work is done already."""
    marker = output / "prepare.json"
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            raise UserError(
                f"{output}: was prepared from other recordings or with other options; choose another output folder, "
                "or delete this one"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output}: is not empty, and was not written by `stepaudio prepare`; choose another folder")
    write_atomically(marker, json.dumps({"fingerprint": fingerprint}).encode())
    finished = output / "report.json"
    if not finished.is_file():
        return None
    content = json.loads(finished.read_text(encoding="utf-8"))
    refused = [Refusal(**refusal) for refusal in content["refused"]]
    return PrepareReport(content["samples"], content["hours"], content["speakers"], refused)


def _run(jobs: list[tuple[Path, list[Item], PrepareOptions]], num_workers: int | None) -> list[tuple[Path, Any]]:
    """Write all shards; (shard, what came of it) in order."""
    num_items = sum(len(items) for _, items, _ in jobs)
    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, math.ceil(num_items / _ITEMS_PER_WORKER))
    results = []
    with tqdm(total=num_items, unit="recording", desc="prepare", dynamic_ncols=True) as bar:
        if num_workers <= 1:
            for job in jobs:
                results.append((job[0], _write_one(job)))
                bar.update(len(job[1]))
            return results
        # Not forked: the parent may hold threads of torch.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
            for job, result in zip(jobs, pool.map(_write_one, jobs), strict=True):
                results.append((job[0], result))
                bar.update(len(job[1]))
    return results


def _write_one(job: tuple[Path, list[Item], PrepareOptions]) -> dict[str, Any]:
    """Write a shard and, behind it, its result file, by which the shard is known to be whole."""
    path, items, options = job
    done = path.with_suffix(".result.json")
    if done.is_file():
        result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return result
    refused: list[Refusal] = []
    durations: list[float] = []
    speakers: Counter[str] = Counter()

    def samples() -> Iterator[ShardSample]:
        for item in items:
            try:
                record, waveforms = _assemble(item, options, refused)
            except AudioError as error:
                # A recording is named once, not again by every copy of it.
                if item.is_original:
                    refused.append(Refusal(item.records[0].id, str(error)))
                continue
            durations.append(sum(len(w) for w in waveforms) / SAMPLE_RATE_HZ)
            speakers.update(p.speaker for p in record.audio_parts() if p.speaker)
            yield _sample(record, waveforms)

    count = write_shard(path, samples())
    result = {
        "samples": count,
        "duration_s": sum(durations),
        "speakers": sorted(speakers),
        "refused": [asdict(r) for r in refused],
    }
    write_atomically(done, json.dumps(result, ensure_ascii=False).encode())
    return result


def _assemble(item: Item, options: PrepareOptions, refused: list[Refusal]) -> tuple[Record, list[Tensor]]:
    """The record of an item, and the waveform of each of its audio parts.

    Raises:
        AudioError: it cannot be used.
    """
    if len(item.records) == 1:
        record = item.records[0]
        waveforms = [_read(part, options) for part in record.audio_parts()]
    else:
        record, waveforms = _join(item, options)
    if item.speed != 1.0:
        waveforms = [resample(w, round(SAMPLE_RATE_HZ * item.speed), SAMPLE_RATE_HZ) for w in waveforms]
    several = len(waveforms) > 1
    endings = [f"{index}.flac" if several else "flac" for index in range(len(waveforms))]
    stored = [_stored(*part, item.speed) for part in zip(record.audio_parts(), waveforms, endings, strict=True)]
    record = replace(with_audio_parts(record, stored), id=item.id, meta=record.meta | item.meta)
    return record, waveforms


def _read(part: AudioPart, options: PrepareOptions) -> Tensor:
    waveform = read_audio(part.audio, SAMPLE_RATE_HZ)
    duration_s = len(waveform) / SAMPLE_RATE_HZ
    if duration_s < options.min_duration_s:
        raise AudioError(f"too short: {duration_s:.3f} s, at least {options.min_duration_s:g} s are needed")
    if duration_s > options.max_duration_s:
        raise AudioError(f"too long: {duration_s:.1f} s, at most {options.max_duration_s:g} s are taken")
    if float(waveform.abs().max()) < _SILENT_PEAK:
        raise AudioError("silent: no sample is over 0.0001 of full scale")
    return waveform


def _join(item: Item, options: PrepareOptions) -> tuple[Record, list[Tensor]]:
    """One recording out of several, with a short pause between them and a span for each."""
    pause = torch.zeros(round(_PAUSE_S * SAMPLE_RATE_HZ))
    pieces: list[Tensor] = []
    spans: list[Span] = []
    position = 0
    for record in item.records:
        part = record.audio_parts()[0]
        try:
            waveform = _read(part, options)
        except AudioError:
            continue  # told where the recording itself is prepared
        if (position + len(waveform)) / SAMPLE_RATE_HZ > options.max_duration_s:
            break
        # A piece's span goes up to the next piece, so that together they cover everything.
        end = position + len(waveform) + len(pause)
        spans.append(Span(position / SAMPLE_RATE_HZ, end / SAMPLE_RATE_HZ, part.text or ""))
        pieces += [waveform, pause]
        position = end
    if len(spans) < 2:
        raise AudioError("fewer than two of its recordings can be used")
    spans[-1] = replace(spans[-1], end_s=(position - len(pause)) / SAMPLE_RATE_HZ)
    first = item.records[0].audio_parts()[0]
    text = " ".join(span.text for span in spans)
    part = AudioPart("", text=text, language=first.language, speaker=first.speaker, spans=tuple(spans))
    return speech_record(item.id, part), [torch.cat(pieces[:-1])]


def _stored(part: AudioPart, waveform: Tensor, ending: str, speed: float) -> AudioPart:
    spans = tuple(Span(s.start_s / speed, s.end_s / speed, s.text) for s in part.spans)
    return replace(part, audio=ending, spans=spans, duration_s=len(waveform) / SAMPLE_RATE_HZ)


def _sample(record: Record, waveforms: list[Tensor]) -> ShardSample:
    content = json.dumps(record_to_json(record), ensure_ascii=False).encode()
    members = {"json": content}
    for part, waveform in zip(record.audio_parts(), waveforms, strict=True):
        encoded = io.BytesIO()
        soundfile.write(encoded, waveform.numpy(), SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
        members[part.audio] = encoded.getvalue()
    return ShardSample(sample_key(record.id), members)


def _report(results: list[tuple[Path, Any]], refusals: list[Refusal]) -> PrepareReport:
    samples: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    speakers: dict[str, set[str]] = {}
    refused = list(refusals)
    for path, result in results:
        refused += [Refusal(**refusal) for refusal in result["refused"]]
        if result["samples"]:
            split = path.parent.name
            samples[split] += result["samples"]
            seconds[split] += result["duration_s"]
            speakers.setdefault(split, set()).update(result["speakers"])
    return PrepareReport(
        dict(samples),
        {split: s / 3600 for split, s in seconds.items()},
        {split: sorted(names) for split, names in speakers.items()},
        sorted(refused, key=lambda r: r.name),
    )
