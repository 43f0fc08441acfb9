"""What every format needs: recordings under the names that the output uses, turns, schemas of tools."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import soundfile

from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.records import Message, Part, Record, TextPart, ToolCall
from stepaudio_train.data.sources import AUDIO_SUFFIXES

Row = Mapping[str, Any]
"""One example of a source, as JSON or a table's row gives it."""
_PICTURES = ("images", "videos")


class RowError(ValueError):
    """A row that cannot become a record. The message names the field, not the row."""


@dataclass(frozen=True)
class Imported:
    """A record, and where it comes from: a file and a line, or a table and a row."""

    where: str
    record: Record


@dataclass(frozen=True)
class Recordings:
    """The recordings of a source, as the output names them: relative to its folder, or absolute outside of it."""

    folder: Path
    """Where relative paths of the source begin. What is not there is looked for from the working directory, where
    Kimi-Audio, ms-swift and Kaldi have them begin."""
    output: Path
    """The JSONL file. What the source holds as bytes is written to `<stem>_audio` beside it."""

    def take(self, given: Any) -> str:
        """The name of a recording that is given as a path, a file: or data: URL, or a dataset's {"bytes", "path"}.

        Raises:
            RowError: there is no such file, its bytes are no audio, or it would have to be downloaded.
        """
        if isinstance(given, Mapping):
            if content := given.get("bytes"):
                return self.keep(content, Path(given.get("path") or "").suffix)
            given = given.get("path")
        if not isinstance(given, str) or not given:
            raise RowError(f"a recording must be given as a path, got {str(given)[:40]!r}")
        if given.startswith(("http://", "https://")):
            raise RowError(f"{given[:80]}: nothing is downloaded; download it, and give the file's path")
        if given.startswith("data:"):
            return self.keep_base64(given.partition(";base64,")[2])
        path = Path(given.removeprefix("file://"))
        for folder in (self.folder, Path.cwd()):
            if os.path.isfile(folder / path):
                return self.name(folder / path)
        raise RowError(f"{given[:200]}: no such recording in {self.folder}, nor in the working directory")

    def keep_base64(self, content: Any, suffix: str = "") -> str:
        """Write a recording that stands in JSON. See `keep`."""
        try:
            decoded = base64.b64decode(content, validate=True)
        except (TypeError, ValueError) as error:
            raise RowError(f"its audio is no base64: {error}") from None
        return self.keep(decoded, suffix)

    def keep(self, content: bytes, suffix: str = "") -> str:
        """Write a recording's bytes, once for all rows that hold the same, under their SHA-256.

        Args:
            suffix: as `.wav`; one that is no audio's gives way to what the bytes are.

        Raises:
            RowError: they are no audio that can be read.
        """
        try:
            found = soundfile.info(io.BytesIO(content))
        except soundfile.SoundFileError:
            raise RowError(f"its {len(content)} bytes of audio cannot be read as audio") from None
        suffix = suffix.lower() if suffix.lower() in AUDIO_SUFFIXES else f".{found.format.lower()}"
        folder = self.output.with_name(f"{self.output.stem}_audio")
        path = folder / f"{hashlib.sha256(content).hexdigest()}{suffix}"
        if not path.is_file():
            write_atomically(path, content)
        return self.name(path)

    def name(self, path: Path) -> str:
        """The path as the output has it."""
        # Links stay as they are: what is linked into the output's folder may be moved together with it.
        path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(self.output.parent))
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def conversation(row: Row, id: str, turns: Iterable[Message], used: Sequence[str]) -> Record:
    """A record of a row's turns, its tools, and in `meta` the fields that are not `used`.

    Args:
        id: where the row has none.

    Raises:
        RowError: it has pictures or an empty turn, or its tools are no list of schemas.
    """
    meta = meta_of(row, ("tools", *used))
    return Record(id_of(row, id), joined_turns(turns), meta, tools=tool_schemas(row.get("tools")))


def id_of(row: Row, default: str) -> str:
    """The row's own id, if it has one."""
    return str(row.get("id") or default)


def meta_of(row: Row, used: Sequence[str]) -> dict[str, Any]:
    """Fields that are not `used`; what JSON cannot hold is left.

    Raises:
        RowError: one of them holds pictures.
    """
    for field in _PICTURES:
        if row.get(field):
            raise RowError(f"{field}: there is no place for them; only text and audio are read")
    left = ("id", *_PICTURES, *used)
    return {name: value for name, value in row.items() if name not in left and value is not None and _is_plain(value)}


def joined_turns(turns: Iterable[Message]) -> tuple[Message, ...]:
    """Turns of the same speaker that follow each other as one, with a line's end between two texts.

    Our human and assistant take turns; other formats let one speak twice, such as text and then audio. Results of
    tools stay apart.

    Raises:
        RowError: a turn is empty.
    """
    joined: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not turn.content:
            raise RowError(f"turn {number} ({turn.role}) is empty")
        last = joined[-1] if joined else None
        if last is None or turn.role != last.role or turn.role not in ("human", "assistant"):
            joined.append(turn)
            continue
        seam = [*last.content[-1:], *turn.content[:1]]
        gap: tuple[Part, ...] = (TextPart("\n"),) if [type(part) for part in seam] == [TextPart, TextPart] else ()
        joined[-1] = replace(last, content=(*last.content, *gap, *turn.content))
    return tuple(joined)


def rows_of(row: Row, field: str) -> list[Row]:
    """The turns in a field.

    Raises:
        RowError: it holds something else.
    """
    turns = row.get(field)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError(f"{field}: must be a list of turns, got {str(turns)[:40]!r}")
    return turns


def tool_call(call: Any) -> ToolCall:
    """A call {"name", "arguments"}, whose arguments are an object or, as from OpenAI, JSON in a string.

    Raises:
        RowError: it is none.
    """
    name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, Mapping) else (None, None)
    if isinstance(arguments, str):
        arguments = from_json(arguments or "{}", "arguments of a tool's call")
    if not isinstance(name, str) or not isinstance(arguments, Mapping | None):
        raise RowError(f'a call of a tool must be {{"name": ..., "arguments": {{...}}}}, got {str(call)[:60]!r}')
    return ToolCall(name, dict(arguments or {}))


def tool_schemas(tools: Any) -> tuple[dict[str, Any], ...]:
    """Schemas of tools, given as a list or as JSON in a string.

    Raises:
        RowError: something else.
    """
    tools = from_json(tools or "[]", "tools") if isinstance(tools, str) else tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"tools: must be a list of schemas, got {str(tools)[:60]!r}")
    return tuple(dict(tool) for tool in tools)


def from_json(text: str, field: str) -> Any:
    """What JSON in a string says.

    Raises:
        RowError: it is no JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(f"{field}: no JSON: {error}") from None


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
