"""A chosen and a rejected answer as a line of preferences (docs/preferences.md)."""

from __future__ import annotations

from typing import Any

from stepaudio_train.data.records import Message, Record, record_to_json


def pair_to_json(
    prompt: Record, chosen: Message, rejected: Message, category: str | None = None, reference: str | None = None
) -> dict[str, Any]:
    """Plain data for JSON, which `data.preference_files.parse_preference` reads."""
    plain = record_to_json(prompt)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        (plain[name],) = record_to_json(Record(prompt.id, (answer,)))["messages"]
    return {**plain, **{name: text for name, text in (("category", category), ("reference", reference)) if text}}
