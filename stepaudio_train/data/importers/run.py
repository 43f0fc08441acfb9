"""`stepaudio data import`: a source in another project's format -> a JSONL file of records, and a report."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, cast, get_args

from tqdm import tqdm

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.sft import ChatTask
from stepaudio_train.data.chat import TurnError, require_order, task_of, turns_of
from stepaudio_train.data.files import replacing, write_atomically
from stepaudio_train.data.importers.base import Imported, Recordings
from stepaudio_train.data.importers.hugging_face import table_records
from stepaudio_train.data.importers.kaldi import kaldi_utterances
from stepaudio_train.data.importers.rows import ROW_FORMATS, fitting_formats, json_rows, row_records
from stepaudio_train.data.importers.spoken import spoken_records
from stepaudio_train.data.prompts import ASR_PROMPT
from stepaudio_train.data.recording_jobs import HUB_PREFIX, is_dataset
from stepaudio_train.data.records import Message, Record, RecordError, TextPart, parse_record, record_to_json
from stepaudio_train.data.sources import Refusal

log = logging.getLogger(__name__)

ImportFormat = Literal["sharegpt", "openai", "kimi", "editx", "kaldi", "hf"]

_ROWS_TO_GUESS_BY = 100
_NAMED_REFUSALS = 10


@dataclass(frozen=True)
class ImportOptions:
    """What `stepaudio data import` is asked for."""

    source: Path
    """A .jsonl or .json file, a Kaldi data directory, a .parquet file, a dataset saved to disk, or hf:NAME:SPLIT."""
    output: Path
    """The JSONL file to write. Recordings that the source holds itself go to `<stem>_audio` beside it."""
    format: ImportFormat | None = None
    """None guesses it by the source."""
    task: ChatTask | None = None
    """What the conversations teach, where the format leaves it open. Recordings with their texts make asr or tts."""


@dataclass(frozen=True)
class ImportReport:
    """What was written, and what was not."""

    source: str
    format: ImportFormat
    guessed: bool
    """Whether the format was."""
    tasks: dict[str, int]
    """Task -> records."""
    refused: list[Refusal]

    def summary(self) -> str:
        """For people."""
        lines = [f"{self.source}: read as {self.format}{' (guessed)' if self.guessed else ''}"]
        lines += [f"{task:<12}{count:>9} records" for task, count in sorted(self.tasks.items())]
        lines.append(f"{len(self.refused)} refused")
        lines += [f"  {refusal.name}: {refusal.reason}" for refusal in self.refused[:_NAMED_REFUSALS]]
        if len(self.refused) > _NAMED_REFUSALS:
            lines.append(f"  and {len(self.refused) - _NAMED_REFUSALS} more, all of them in the report")
        return "\n".join(lines) + "\n"


def import_conversations(options: ImportOptions) -> ImportReport:
    """Write the records of a source to `options.output`, and the report beside it, `<output>.report.json`.

    What cannot be used is left out, by file, line and reason.

    Raises:
        UserError: the source cannot be read, its format cannot be told, or nothing in it can be used.
    """
    _check(options)
    format = options.format or guess_format(options.source)
    log.info("%s: read as %s", options.source, format)
    tasks: Counter[str] = Counter()
    refused: list[Refusal] = []
    with replacing(options.output) as temporary:
        with temporary.open("w", encoding="utf-8") as lines:
            for item in tqdm(_items(options, format), desc="import", unit="record", dynamic_ncols=True):
                record = item if isinstance(item, Refusal) else _checked(item, options.task)
                if isinstance(record, Refusal):
                    refused.append(record)
                    continue
                lines.write(json.dumps(record_to_json(record), ensure_ascii=False) + "\n")
                tasks[task_of(record)] += 1
        if not tasks:
            reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3]) or "it is empty"
            raise UserError(f"{options.source}: nothing in it can be used as {format} ({reasons})")
    report = ImportReport(str(options.source), format, options.format is None, dict(tasks), refused)
    content = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    write_atomically(options.output.with_name(f"{options.output.name}.report.json"), content.encode())
    return report


def guess_format(source: Path) -> ImportFormat:
    """The one format that a source is in, by its kind of file and its first rows.

    Raises:
        UserError: it may be in several, or is in none.
    """
    names: set[str] = set()
    if is_dataset(source):
        names.add("hf")
    if source.is_dir():
        names |= {"kaldi"} if (source / "wav.scp").is_file() else set()
    elif not names:
        rows = islice(json_rows(source), _ROWS_TO_GUESS_BY)
        fitting = [set(fits) for fits in (fitting_formats(row) for _, row in rows) if fits]
        names = set.intersection(*fitting) if fitting else set()
    if len(names) != 1:
        found = f"may be {' or '.join(sorted(names))}" if names else "is in no format that can be told"
        raise UserError(f"{source}: {found}; type --from {'|'.join(sorted(names) or get_args(ImportFormat))}")
    return cast(ImportFormat, names.pop())


def _check(options: ImportOptions) -> None:
    if not options.source.exists() and not str(options.source).startswith(HUB_PREFIX):
        raise UserError(f"{options.source}: no such file or folder")
    if options.output.suffix != ".jsonl" or options.output.resolve() == options.source.resolve():
        raise UserError(f"{options.output}: the output must be another file, and its name must end with .jsonl")
    if options.format in ROW_FORMATS and not options.source.is_file():
        raise UserError(f"{options.source}: {options.format} is read from a file; type --from kaldi or hf for others")


def _items(options: ImportOptions, format: ImportFormat) -> Iterator[Imported | Refusal]:
    source = options.source
    recordings = Recordings(source if source.is_dir() else source.parent, options.output)
    if format == "kaldi":
        return spoken_records(kaldi_utterances(source, recordings), options.task)
    if format == "hf":
        return table_records(source, recordings, options.task)
    return row_records(json_rows(source), format, recordings, source.stem)


def _checked(item: Imported, task: ChatTask | None) -> Record | Refusal:
    """The record as it will be read again, if it keeps the schema and its turns make a conversation."""
    try:
        record = parse_record(json.dumps(record_to_json(_with_task(item.record, task))), item.where)
        # Whether earlier recordings have the transcripts that dialogues need is for the training's settings to say.
        require_order(turns_of(record, audio_history=True))
    except (RecordError, TurnError) as error:
        return Refusal(item.where, str(error).removeprefix(f"{item.where}: "))
    return record


def _with_task(record: Record, task: ChatTask | None) -> Record:
    if task is None:
        return record
    if task == "asr" and record.messages and record.messages[0].role != "system":
        record = replace(record, messages=(Message("system", (TextPart(ASR_PROMPT),)), *record.messages))
    return replace(record, task=task)
