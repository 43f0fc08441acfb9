"""Kimi-Audio's fine-tuning data (finetune_codes/README.md, kimia_infer/api/prompt_manager.py)."""

from __future__ import annotations

from collections.abc import Mapping

from stepaudio_train.data.importers.base import Recordings, Row, RowError, conversation, rows_of
from stepaudio_train.data.records import AudioPart, Message, Part, Record, Role, TextPart

_ROLES: dict[object, Role] = {"user": "human", "assistant": "assistant", "system": "system"}


def is_kimi(row: Row) -> bool:
    """`conversation`, whose turns have a `message_type`."""
    turns = row.get("conversation")
    return isinstance(turns, list) and all(isinstance(turn, Mapping) and "message_type" in turn for turn in turns)


def kimi_record(row: Row, recordings: Recordings, id: str) -> Record:
    """A record; what one speaker says in several messages is one turn. Kimi's own codes (`audio_tokens`) are left.

    Raises:
        RowError: an unknown role or type of message, or a recording that cannot be had.
    """
    turns = [_turn(number, turn, recordings) for number, turn in enumerate(rows_of(row, "conversation"), 1)]
    return conversation(row, id, turns, ("conversation",))


def _turn(number: int, turn: Row, recordings: Recordings) -> Message:
    kind, content, role = turn.get("message_type"), turn.get("content"), turn.get("role")
    if role not in _ROLES:
        raise RowError(f"turn {number}: its role must be one of {', '.join(map(str, _ROLES))}, got {role!r}")
    part: Part
    if kind == "text" and isinstance(content, str):
        part = TextPart(content)
    elif kind == "audio":
        part = AudioPart(recordings.take(content))
    elif kind == "audio-text" and isinstance(content, list) and len(content) == 2 and isinstance(content[1], str):
        part = AudioPart(recordings.take(content[0]), text=content[1])
    else:
        raise RowError(
            f"turn {number}: must be text, audio with a path, or audio-text with [path, text]; got {kind!r} with "
            f"{str(content)[:40]!r}"
        )
    return Message(_ROLES[role], (part,))
