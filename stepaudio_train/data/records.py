"""The one record schema: every example, from a bare recording to a dialogue, is a record of messages.

{"id": "7_theo_3", "messages": [{"role": "human", "content": [
    {"type": "audio", "audio": "7_theo_3.wav", "text": "seven", "language": "en", "speaker": "theo"}]}]}

Two common ways of writing are taken as well: the role "user" is "human", and a string as content is one text part.
Conversations may name their task, and the tools that the assistant can call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, TypeAdapter, ValidationError

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.sft import ChatTask

_STRICT = ConfigDict(extra="forbid", strict=True)

Role = Literal["human", "assistant", "system", "tool", "tool_json_schemas"]
"""`tool` gives a tool's result; `tool_json_schemas` lists the tools, and is made of `Record.tools` (formats.md 2.4)."""


class RecordError(UserError):
    """A record is not what the schema says. The message names the file, the line and the field."""


@dataclass(frozen=True)
class Span:
    """A stretch of a recording and the words in it."""

    __pydantic_config__ = _STRICT

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class TextPart:
    """Written content."""

    __pydantic_config__ = _STRICT

    text: str
    type: Literal["text"] = "text"


@dataclass(frozen=True)
class AudioPart:
    """Spoken content."""

    __pydantic_config__ = _STRICT

    audio: str = ""
    """A path (in a manifest: relative to it), or, inside a shard, the ending of the sample's audio or token files. May
    be left out where `tokens` are given."""
    tokens: str | None = None
    """The codes in the released text form, `<audio_12><audio_1030>...`, two linguistic and three semantic in turn."""
    text: str | None = None
    """What is said."""
    language: str | None = None
    speaker: str | None = None
    spans: tuple[Span, ...] = ()
    """Aligned pieces, in time order, without overlap; their texts make up `text`."""
    duration_s: float | None = None
    type: Literal["audio"] = "audio"


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, in a turn of the assistant."""

    __pydantic_config__ = _STRICT

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    type: Literal["tool_call"] = "tool_call"


Part = Annotated[TextPart | AudioPart | ToolCall, Discriminator("type")]


@dataclass(frozen=True)
class Message:
    """One turn."""

    __pydantic_config__ = _STRICT

    role: Role
    content: tuple[Part, ...]


@dataclass(frozen=True)
class Record:
    """One example."""

    __pydantic_config__ = _STRICT

    id: str
    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    """Anything else that is known about the example. Never rendered."""
    task: ChatTask | None = None
    """Of a conversation; where it is left out, it follows from who says what how (`data.chat.task_of`)."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the tools that the assistant may call."""

    def audio_parts(self) -> list[AudioPart]:
        """All recordings, in order."""
        return [part for message in self.messages for part in message.content if isinstance(part, AudioPart)]


_RECORD = TypeAdapter(Record)


def speech_record(id: str, part: AudioPart, meta: dict[str, Any] | None = None) -> Record:
    """A recording, on its own."""
    return Record(id, (Message("human", (part,)),), meta=meta or {})


def text_record(id: str, text: str, meta: dict[str, Any] | None = None) -> Record:
    """A text, on its own."""
    return Record(id, (Message("human", (TextPart(text),)),), meta=meta or {})


def with_audio_parts(record: Record, parts: Sequence[AudioPart]) -> Record:
    """The record with its audio parts replaced by `parts`, as many and in the same order."""
    following = iter(parts)
    messages = tuple(
        replace(message, content=tuple(next(following) if isinstance(p, AudioPart) else p for p in message.content))
        for message in record.messages
    )
    return replace(record, messages=messages)


def parse_record(content: str | bytes, where: str, default_id: str | None = None) -> Record:
    """Read one record from JSON.

    Args:
        where: file and line, for errors.
        default_id: of a record that has none; None refuses such a record.

    Raises:
        RecordError: naming `where` and every field that is wrong.
    """
    try:
        record = _validated(content, default_id)
    except ValidationError as error:
        raise RecordError(f"{where}: {'; '.join(describe_problem(problem) for problem in error.errors())}") from None
    problems = list(_problems(record))
    if problems:
        raise RecordError(f"{where}: {'; '.join(problems)}")
    return record


def read_records(path: Path) -> Iterator[Record]:
    """Records of a JSONL file; blank lines are skipped.

    Raises:
        RecordError: at the first line that is no record.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_record(line, f"{path}:{number}")


def record_to_json(record: Record) -> dict[str, Any]:
    """Plain data for JSON, without fields that say nothing."""
    return _plain(record)


def _validated(content: str | bytes, default_id: str | None) -> Record:
    try:
        return _RECORD.validate_json(content)
    except ValidationError as error:
        # Rewritten only now: the strict form, which this project's own programs write, is read in one go.
        rewritten = _in_strict_form(content, default_id)
        if rewritten is None:
            raise error
        return _RECORD.validate_json(rewritten)


def _in_strict_form(content: str | bytes, default_id: str | None) -> str | None:
    """The same record without the shorter ways of writing; None for what is no JSON object with a list of messages."""
    try:
        plain = json.loads(content)
    except ValueError:  # broken JSON, or bytes that are not UTF-8
        return None
    if not isinstance(plain, dict) or not isinstance(plain.get("messages"), list):
        return None
    if default_id is not None:
        plain.setdefault("id", default_id)
    for message in plain["messages"]:
        if isinstance(message, dict):
            if message.get("role") == "user":
                message["role"] = "human"
            if isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    return json.dumps(plain)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in fields(value)}
        return {name: _plain(inner) for name, inner in named.items() if inner not in (None, (), {})}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def describe_problem(problem: Any) -> str:
    """One of pydantic's errors, in a line: the field, what it must be, and what it is."""
    # Pydantic names the chosen kind of part behind its index: messages, 0, content, 1, audio, ...
    location = ".".join(str(part) for i, part in enumerate(problem["loc"]) if i != 4) or "the line"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{location}: unknown field"
    message = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    shown = repr(problem["input"])
    return f"{location}: {message}, got {shown if len(shown) < 80 else shown[:77] + '...'}"


def _problems(record: Record) -> Iterator[str]:
    """Rules that types cannot say."""
    if not record.id.strip():
        yield "id: must not be empty"
    if not record.messages:
        yield "messages: must hold at least one message"
    for m, message in enumerate(record.messages):
        if not message.content:
            yield f"messages.{m}.content: must hold at least one part"
        for p, part in enumerate(message.content):
            if isinstance(part, AudioPart):
                for problem in _audio_problems(part):
                    yield f"messages.{m}.content.{p}.{problem}"
            elif isinstance(part, ToolCall) and message.role != "assistant":
                yield f"messages.{m}.content.{p}: the assistant calls tools, not {message.role}"


def _audio_problems(part: AudioPart) -> Iterator[str]:
    if not part.audio and not part.tokens:
        yield "audio: must name a file, or tokens must hold its codes"
    if part.duration_s is not None and not (math.isfinite(part.duration_s) and part.duration_s > 0):
        yield f"duration_s: must be over 0, got {part.duration_s}"
    before_s = 0.0
    for s, span in enumerate(part.spans):
        if not (before_s <= span.start_s < span.end_s < math.inf):
            yield (
                f"spans.{s}: must start at or after the end of the one before ({before_s:g} s) and end later, got "
                f"{span.start_s:g} to {span.end_s:g} s"
            )
        before_s = max(before_s, span.end_s)
