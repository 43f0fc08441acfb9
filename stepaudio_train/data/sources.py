"""Finding recordings and what is said in them: a folder with transcripts, or a manifest."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.records import AudioPart, Record, RecordError, parse_record, speech_record, with_audio_parts

AUDIO_SUFFIXES = frozenset(
    (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".m4a", ".aac", ".wma", ".amr")
)
"""What counts as a recording in a folder. Those that cannot be read are refused by name, not passed over."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class SourceError(UserError):
    """The input as a whole cannot be used."""


@dataclass(frozen=True)
class Refusal:
    """A recording that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """Records whose audio parts hold absolute paths, ids unique; and what was left out already."""

    records: list[Record]
    refusals: list[Refusal]


def find_recordings(source: Path, allow_untranscribed: bool = False) -> Found:
    """Records of a folder of audio, or of a manifest (.jsonl, .tsv or .csv).

    Transcripts for a folder come from, in this order: a .txt or .lab file beside the recording; transcripts.jsonl,
    transcripts.tsv or metadata.csv (`id|text` a line) in the folder; the file's name up to the first `_`, where one
    digit means its English word. Of such a name with three parts the second one is the speaker.

    Args:
        allow_untranscribed: keep recordings without a transcript; audio continuation needs none.

    Raises:
        SourceError: nothing usable, and why.
    """
    if source.is_dir():
        found = _unique(_scan_folder(source, allow_untranscribed))
    elif source.is_file():
        found = _unique(_read_manifest(source, allow_untranscribed))
    else:
        raise SourceError(f"{source}: no such file or folder")
    if not found.records:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in found.refusals[:3]) or "it holds no audio files"
        raise SourceError(f"{source}: no usable recording ({reasons})")
    return found


def _unique(items: Iterator[Record | Refusal]) -> Found:
    records: dict[str, Record] = {}
    refusals = []
    for item in items:
        if isinstance(item, Refusal):
            refusals.append(item)
        elif item.id in records:
            refusals.append(Refusal(item.audio_parts()[0].audio, f"its id {item.id!r} is taken by another recording"))
        else:
            records[item.id] = item
    return Found([records[id] for id in sorted(records)], refusals)


def _scan_folder(folder: Path, allow_untranscribed: bool) -> Iterator[Record | Refusal]:
    listed = _listed_transcripts(folder)
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file()):
        name = path.relative_to(folder).as_posix()
        text, speaker = _sidecar(path), None
        if text is None:
            text, speaker = listed.get(name) or listed.get(path.name) or listed.get(path.stem) or (None, None)
        if text is None:
            text, speaker = _from_name(path.stem)
        if not text and not allow_untranscribed:
            yield Refusal(name, "no transcript: no .txt or .lab beside it, none listed, and no word begins its name")
            continue
        yield speech_record(
            name.removesuffix(path.suffix), AudioPart(str(path.resolve()), text=text or None, speaker=speaker or None)
        )


def _sidecar(path: Path) -> str | None:
    for suffix in (".txt", ".lab"):
        beside = path.with_suffix(suffix)
        if beside.is_file():
            return _clean(beside.read_text(encoding="utf-8"))
    return None


def _from_name(stem: str) -> tuple[str | None, str | None]:
    """`7_theo_3` -> ("seven", "theo")."""
    parts = stem.split("_")
    word = parts[0]
    if len(parts) == 1:
        return None, None
    if re.fullmatch(r"[0-9]", word):
        word = DIGITS[int(word)]
    elif not re.fullmatch(r"[^\W\d]+(['-][^\W\d]+)*", word):
        return None, None
    return word, parts[1] if len(parts) == 3 else None


def _listed_transcripts(folder: Path) -> dict[str, tuple[str, str | None]]:
    """File name, with or without folder or ending -> (transcript, speaker)."""
    listed: dict[str, tuple[str, str | None]] = {}
    rows: Iterator[dict[str, Any]]
    for name in ("transcripts.jsonl", "transcripts.tsv", "metadata.csv"):
        path = folder / name
        if not path.is_file():
            continue
        if name == "transcripts.jsonl":
            rows = (row for _, row in _json_rows(path))
        elif name == "transcripts.tsv":
            rows = (row for _, row in _table_rows(path, "\t", ("audio", "text", "speaker")))
        else:
            rows = (row for _, row in _table_rows(path, "|", ("audio", "text", "normalised")))
        for row in rows:
            text = row.get("normalised") or row.get("text")
            if row.get("audio") and text:
                listed.setdefault(str(row["audio"]), (_clean(str(text)), row.get("speaker")))
    return listed


def _read_manifest(path: Path, allow_untranscribed: bool) -> Iterator[Record | Refusal]:
    if path.suffix == ".jsonl":
        rows = _json_rows(path)
    elif path.suffix in (".tsv", ".csv"):
        rows = _table_rows(path, "\t" if path.suffix == ".tsv" else ",", None)
    else:
        raise SourceError(f"{path}: a manifest is a .jsonl, .tsv or .csv file")
    for number, row in rows:
        where = f"{path}:{number}"
        try:
            record = _row_to_record(row, where)
        except RecordError as error:
            yield Refusal(where, str(error).removeprefix(f"{where}: "))
            continue
        untranscribed = [p.audio for p in record.audio_parts() if not p.text]
        if not record.audio_parts():
            yield Refusal(where, "holds no audio")
        elif untranscribed and not allow_untranscribed:
            yield Refusal(untranscribed[0], "no transcript: `text` is missing or empty")
        else:
            yield _with_paths(record, path.parent)


def _row_to_record(row: dict[str, Any], where: str) -> Record:
    """A record as it is, or a flat row {"audio", "text", ...}: what is no field of an audio part becomes meta."""
    if "messages" not in row:
        row = dict(row)
        if not row.get("audio"):
            raise RecordError(f"{where}: audio: must name a file")
        id = str(row.pop("id", None) or Path(row["audio"]).with_suffix("").as_posix())
        row.pop("duration_s", None)  # measured when the file is read
        known = {k: row.pop(k) for k in ("audio", "text", "language", "speaker", "spans") if k in row}
        part = {"type": "audio"} | {k: v for k, v in known.items() if v not in (None, "")}
        if "text" in part:
            part["text"] = _clean(str(part["text"]))
        row = {"id": id, "messages": [{"role": "human", "content": [part]}], "meta": row}
    return parse_record(json.dumps(row), where)


def _with_paths(record: Record, folder: Path) -> Record:
    parts = [replace(part, audio=str((folder / part.audio).resolve())) for part in record.audio_parts()]
    return with_audio_parts(record, parts)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SourceError(f"{path}:{number}: no JSON: {error}") from None
            if not isinstance(row, dict):
                raise SourceError(f"{path}:{number}: must be a JSON object, got {line.strip()[:60]!r}")
            yield number, row


def _table_rows(path: Path, delimiter: str, columns: tuple[str, ...] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table. `columns` names them where the first line is no header; without it, a header is required."""
    with path.open(encoding="utf-8", newline="") as file:
        # Only a comma-separated table may quote: a transcript may well begin with a quotation mark.
        quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        lines = csv.reader(file, delimiter=delimiter, quoting=quoting)
        for row in lines:
            if lines.line_num == 1 and "audio" in row and "text" in row:
                columns = tuple(row)
            elif columns is None:
                raise SourceError(f"{path}: its first line must name the columns, `audio` and `text` among them")
            elif row:
                yield lines.line_num, dict(zip(columns, row, strict=False))


def _clean(text: str) -> str:
    return " ".join(text.split())
