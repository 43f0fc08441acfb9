"""Tables of Hugging Face datasets: conversations, or recordings with their texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.sft import ChatTask
from stepaudio_train.data.importers.base import Imported, Recordings, RowError, id_of
from stepaudio_train.data.importers.rows import row_records
from stepaudio_train.data.importers.spoken import Utterance, spoken_records
from stepaudio_train.data.recording_jobs import TEXT_FIELDS, load_dataset
from stepaudio_train.data.records import AudioPart
from stepaudio_train.data.sources import Refusal

_CONVERSATIONS = ("messages", "conversations", "conversation", "source_text")
_ROWS_AT_ONCE = 64


def table_records(source: Path, recordings: Recordings, task: ChatTask | None) -> Iterator[Imported | Refusal]:
    """Records of a table with a column of conversations, in any of the formats of rows, or with `audio` and a text.

    Raises:
        UserError: the table cannot be read or has no such columns; for recordings, a task that they do not make.
    """
    dataset = load_dataset(str(source))
    columns = dataset.column_names
    rows = ((f"{source}: row {number}", row) for number, row in enumerate(_rows(dataset)))
    if any(name in columns for name in _CONVERSATIONS):
        yield from row_records(rows, None, recordings, source.stem)
    elif "audio" in columns and any(name in columns for name in TEXT_FIELDS):
        yield from spoken_records((_utterance(where, row, recordings, source.stem) for where, row in rows), task)
    else:
        raise UserError(
            f"{source}: needs a column {', '.join(_CONVERSATIONS)}, or `audio` and one of {', '.join(TEXT_FIELDS)}; "
            f"it has {', '.join(columns)}"
        )


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows as they are stored, audio undecoded, without the nulls that a table puts in the fields that a row lacks."""
    for table in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
        yield from map(_without_nulls, table.to_pylist())


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _utterance(where: str, row: dict[str, Any], recordings: Recordings, stem: str) -> Utterance | Refusal:
    text = " ".join(next((str(row[name]) for name in TEXT_FIELDS if row.get(name)), "").split())
    speaker, language = (str(row[name]) if name in row else None for name in ("speaker", "language"))
    try:
        if not text:
            raise RowError("has no text")
        audio = AudioPart(recordings.take(row.get("audio")), text=text, speaker=speaker, language=language)
    except RowError as error:
        return Refusal(where, str(error))
    return Utterance(where, id_of(row, f"{stem}-{where.rpartition(' ')[2]}"), text, audio)
