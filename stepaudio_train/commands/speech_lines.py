"""Lines of what is to be spoken, as texts or as tokens: read, checked, and refused by file and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stepaudio_train.data.sources import Refusal
from stepaudio_train.tokenizers.speech import SpeechTokens

_LONGEST_NAME = 200
"""Bytes of an id: file systems take 255 for a name and what stands around it."""


@dataclass(frozen=True)
class TextLine:
    """A text to be spoken."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    text: str
    """May begin with instruction tags."""
    voice: str | None = None
    """A recording of the voice, relative to the file."""
    voice_text: str | None = None
    """What `voice` says."""
    speaker: str | None = None


@dataclass(frozen=True)
class TokensLine:
    """Tokens to be made sound. Further fields are kept (`vars`): lines are answers of other commands."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)

    id: str
    audio_tokens: str
    """`<audio_12><audio_1040>...`, as `stepaudio generate` writes them."""
    voice: str | None = None

    def speech(self) -> SpeechTokens:
        """The codes.

        Raises:
            ValueError: anything but whole groups of two linguistic and three semantic tokens.
        """
        return SpeechTokens.from_text(self.audio_tokens)


class Line(Protocol):
    """A dataclass of a line's fields."""

    @property
    def id(self) -> str: ...


LineT = TypeVar("LineT", bound=Line)


@dataclass(frozen=True)
class FileLine(Generic[LineT]):
    """A line, and where it stands."""

    where: str
    """file:line, or the id of what was typed on the command line."""
    number: int
    """From 0, refused lines counted: what is drawn for a line does not depend on whether others are mended."""
    line: LineT
    folder: Path = Path()
    """What paths in it are relative to."""


def read_lines(path: Path, line_type: type[LineT]) -> Iterator[FileLine[LineT] | Refusal]:
    """The lines of a JSONL file, or why one cannot be used; blank ones are skipped."""
    adapter = TypeAdapter(line_type)
    taken: set[str] = set()
    with path.open("rb") as lines:
        for number, content in enumerate(lines):
            where = f"{path}:{number + 1}"
            if not content.strip():
                continue
            try:
                line = adapter.validate_json(content)
            except ValidationError as error:
                yield Refusal(where, "; ".join(map(_described, error.errors())))
                continue
            if problem := _id_problem(line.id, taken):
                yield Refusal(where, problem)
                continue
            taken.add(line.id)
            yield FileLine(where, number, line, path.parent)


def _id_problem(id: str, taken: set[str]) -> str | None:
    """Why an id cannot name a file."""
    if id in taken:
        return f"id: {id!r} names an earlier line already"
    if not id.strip() or id.startswith(".") or any(mark in id for mark in "/\\\0") or len(id.encode()) > _LONGEST_NAME:
        return f"id: {id!r} cannot name a file: no slashes, no dot in front, at most {_LONGEST_NAME} bytes"
    return None


def _described(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"])) or "the line"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{place}: unknown field"
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
