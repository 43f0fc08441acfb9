"""Lists of messages: ShareGPT, as LLaMA-Factory and ms-swift write it, and OpenAI's chat completions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from stepaudio_train.data.importers.base import (
    Recordings,
    Row,
    RowError,
    conversation,
    from_json,
    rows_of,
    tool_call,
)
from stepaudio_train.data.records import AudioPart, Message, Part, Record, Role, TextPart

_PLACEHOLDER = "<audio>"
_CALLS = ("function_call", "tool_call")
_SHAREGPT_ROLES: dict[Any, Role] = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
}
_OPENAI_ROLES: dict[Any, Role] = {
    "user": "human",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
}


def is_sharegpt(row: Row) -> bool:
    """`conversations`, or `messages` that are all strings."""
    if isinstance(row.get("conversations"), list):
        return True
    turns = row.get("messages")
    return isinstance(turns, list) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("content"), str) and not turn.get("tool_calls")
        for turn in turns
    )


def sharegpt_record(row: Row, recordings: Recordings, id: str) -> Record:
    """A record whose recordings stand in `audios` (or `audio`), in the order of the `<audio>` in its texts.

    Blanks beside an `<audio>` go.

    Raises:
        RowError: another number of recordings than of `<audio>`; an unknown role; a turn that is no text.
    """
    field = "messages" if row.get("conversations") is None else "conversations"
    turns = [_sharegpt_turn(number, turn) for number, turn in enumerate(rows_of(row, field), 1)]
    given = row.get("audios") or row.get("audio") or []
    given = given if isinstance(given, list) else [given]
    wanted = sum(text.count(_PLACEHOLDER) for _, text in turns)
    if wanted != len(given):
        raise RowError(f"audios: {len(given)} recordings for {wanted} {_PLACEHOLDER}")
    following = iter(given)
    messages = [
        Message(
            _SHAREGPT_ROLES[name],
            _calls(text) if name in _CALLS else tuple(_text_and_audio(text, recordings, following)),
        )
        for name, text in turns
    ]
    if row.get("system"):
        messages.insert(0, Message("system", (TextPart(str(row["system"])),)))
    return conversation(row, id, messages, (field, "audios", "audio", "system"))


def is_openai(row: Row) -> bool:
    """`messages` with OpenAI's roles, whose recordings, if any, stand in them."""
    turns = row.get("messages")
    return isinstance(turns, list) and not _has_audio_beside(row) and all(_is_openai_turn(turn) for turn in turns)


def openai_record(row: Row, recordings: Recordings, id: str) -> Record:
    """A record of chat completions' messages: `input_audio`, `audio_url`, spoken answers, calls of tools.

    Raises:
        RowError: an unknown role or kind of content, or a recording that cannot be had.
    """
    if _has_audio_beside(row):
        raise RowError("audios: stand in the messages in this format; type --from sharegpt for recordings beside them")
    messages = []
    for number, turn in enumerate(rows_of(row, "messages"), 1):
        role = turn.get("role")
        if role not in _OPENAI_ROLES:
            raise RowError(f"turn {number}: its role must be one of {', '.join(_OPENAI_ROLES)}, got {role!r}")
        messages.append(Message(_OPENAI_ROLES[role], tuple(_openai_parts(turn, recordings))))
    return conversation(row, id, messages, ("messages",))


def _sharegpt_turn(number: int, turn: Row) -> tuple[str, str]:
    """Role and text."""
    role = turn.get("from") or turn.get("role")
    text = turn.get("content") if turn.get("value") is None else turn["value"]
    if role not in _SHAREGPT_ROLES:
        raise RowError(f"turn {number}: its role must be one of {', '.join(_SHAREGPT_ROLES)}, got {role!r}")
    if not isinstance(text, str):
        raise RowError(f"turn {number}: must hold text, got {str(text)[:40]!r}")
    return role, text


def _calls(text: str) -> tuple[Part, ...]:
    """A call, or a list of calls at once."""
    calls = from_json(text, "a call of a tool")
    return tuple(tool_call(call) for call in (calls if isinstance(calls, list) else [calls]))


def _text_and_audio(text: str, recordings: Recordings, following: Iterator[Any]) -> Iterator[Part]:
    if _PLACEHOLDER not in text:
        yield from [TextPart(text)] if text else []
        return
    for piece in re.split(f"({_PLACEHOLDER})", text):
        if piece == _PLACEHOLDER:
            yield AudioPart(recordings.take(next(following)))
        elif piece.strip():
            yield TextPart(piece.strip())


def _has_audio_beside(row: Row) -> bool:
    return bool(row.get("audios") or row.get("audio"))


def _is_openai_turn(turn: Any) -> bool:
    if not isinstance(turn, Mapping) or turn.get("role") not in _OPENAI_ROLES:
        return False
    content = turn.get("content")
    return not (isinstance(content, str) and _PLACEHOLDER in content)


def _openai_parts(turn: Row, recordings: Recordings) -> Iterator[Part]:
    content = turn.get("content") or []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        yield _openai_part(part, recordings)
    if spoken := turn.get("audio"):
        # As chat completions answer in speech: {"id", "data", "transcript"}.
        if not isinstance(spoken, Mapping) or not spoken.get("data"):
            raise RowError("audio: a spoken answer must hold its `data`, its id alone says nothing")
        yield AudioPart(recordings.keep_base64(spoken["data"]), text=spoken.get("transcript"))
    for call in turn.get("tool_calls") or []:
        yield tool_call(call.get("function") if isinstance(call, Mapping) else call)
    if turn.get("function_call"):
        yield tool_call(turn["function_call"])


def _openai_part(part: Any, recordings: Recordings) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return TextPart(part["text"])
    if kind == "input_audio" and isinstance(part.get("input_audio"), Mapping):
        data, suffix = part["input_audio"].get("data"), f".{part['input_audio'].get('format')}"
        if isinstance(data, str) and data.startswith(("http://", "https://", "data:")):
            return AudioPart(recordings.take(data))
        return AudioPart(recordings.keep_base64(data, suffix))
    if kind in ("audio_url", "audio"):
        # Qwen's way, {"type": "audio", "audio": PATH} or "audio_url", is taken too.
        given = part.get("audio_url") or part.get("audio")
        given = given["url"] if isinstance(given, Mapping) and "url" in given else given
        return AudioPart(recordings.take(given), text=part.get("text"))
    raise RowError(f"content must be text, input_audio or audio_url, got {str(part)[:60]!r}")
