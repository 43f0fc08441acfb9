"""Formats with a conversation a row, and the JSON files that hold them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepaudio_train.data.importers.base import Imported, Recordings, Row, RowError
from stepaudio_train.data.importers.editx import editx_record, is_editx
from stepaudio_train.data.importers.kimi import is_kimi, kimi_record
from stepaudio_train.data.importers.messages import is_openai, is_sharegpt, openai_record, sharegpt_record
from stepaudio_train.data.records import Record
from stepaudio_train.data.sources import Refusal

_BETWEEN_ITEMS = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class RowFormat:
    """A way to write a conversation as a row."""

    fits: Callable[[Row], bool]
    """Whether a row looks like it."""
    record: Callable[[Row, Recordings, str], Record]
    """Row, recordings, an id for a row without one -> record; raises RowError."""


ROW_FORMATS = {
    "sharegpt": RowFormat(is_sharegpt, sharegpt_record),
    "openai": RowFormat(is_openai, openai_record),
    "kimi": RowFormat(is_kimi, kimi_record),
    "editx": RowFormat(is_editx, editx_record),
}


def fitting_formats(row: Any) -> list[str]:
    """Names of the formats that a row may be written in. What fits several gives the same record in each."""
    return [name for name, format in ROW_FORMATS.items() if isinstance(row, dict) and format.fits(row)]


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of a file with an object a line, or with one list of objects; a broken one is a `Refusal`."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        is_list = next((line.lstrip()[0] for line in lines if line.strip()), "") == "["
        lines.seek(0)
        yield from _list_rows(path, lines.read()) if is_list else _line_rows(path, lines)


def row_records(
    rows: Iterable[tuple[str, Any]], format: str | None, recordings: Recordings, stem: str
) -> Iterator[Imported | Refusal]:
    """Records of rows.

    Args:
        format: of all rows; None takes for each the one that it fits.
        stem: begins the ids of rows without one; their number follows.
    """
    for number, (where, row) in enumerate(rows, 1):
        if isinstance(row, Refusal):
            yield row
            continue
        name = format or next(iter(fitting_formats(row)), None)
        if name is None or not isinstance(row, dict):
            yield Refusal(where, f"must be an object written as {', '.join(ROW_FORMATS)}, got {str(row)[:60]!r}")
            continue
        try:
            yield Imported(where, ROW_FORMATS[name].record(row, recordings, f"{stem}-{number:06d}"))
        except RowError as error:
            yield Refusal(where, str(error))


def _line_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            if line.strip():
                yield where, json.loads(line)
        except ValueError as error:
            yield where, Refusal(where, f"no JSON: {error}")


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Items of a JSON list, one by one, to know the line that each begins in."""
    decode = json.JSONDecoder().raw_decode
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        between = _BETWEEN_ITEMS.match(text, position)
        start = between.end() if between else position
        line, counted = line + text.count("\n", counted, start), start
        where = f"{path}:{line}"
        if text.startswith("]", start):
            return
        try:
            row, position = decode(text, start)
        except ValueError as error:
            yield where, Refusal(where, f"no JSON from here on: {error}")
            return
        yield where, row
