"""Markdown as sentences: what a page shows by its layout is said, or left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.markdown import Markdown

_ENDED = re.compile(r"""[.!?。！？…:：;；,，、]["'”’）)」』]*$""")
_STOPS = re.compile(r"[.!?。！？…:：;；,，、\n]")
_HTML_TAG = re.compile(r"<[^<>]*>")
_TASK_BOX = re.compile(r"^\[[ xX]\] ")
_SHORT_ITEM_CHARACTERS = 24


@dataclass(frozen=True)
class Joints:
    """How a language joins what the layout keeps apart."""

    stop: str
    """Ends a sentence."""
    between_sentences: str
    between_items: str
    """Of a list that is one sentence."""
    between_cells: str
    """Of a table's row."""
    behind_first_cell: str
    """It says what the row is about."""
    before_cell: str
    """Behind the name of its column."""


def speak_markdown(text: str, joints: Joints) -> str:
    """A line for each paragraph, list and table. Links give their text; pictures, code blocks and HTML's tags go."""
    lines: list[str] = []
    # Text goes to the innermost open list, and that, when it closes, as one text to what is around it.
    targets, rows = [lines], list[list[str]]()
    for before, token in pairwise([None, *Markdown(text).parsed]):
        opened_by = before.type if before is not None else ""
        if token.type in ("bullet_list_open", "ordered_list_open"):
            targets.append([])
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            items = targets.pop()
            targets[-1].append(_list(items, joints))
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "table_close":
            targets[-1].append(_table(rows, joints))
            rows = []
        elif token.type in ("code_block", "html_block"):  # indented text is seldom code; a fence always is
            targets[-1].append(_HTML_TAG.sub(" ", token.content))
        elif token.type == "inline" and opened_by in ("th_open", "td_open"):
            rows[-1].append(_inline(token))
        elif token.type == "inline":
            content = _inline(token)
            targets[-1].append(_ended(content, joints) if opened_by == "heading_open" else content)
    return "\n".join(lines)


def _inline(token: Any) -> str:
    """The words of a line, whatever they are marked as."""
    instead = {"softbreak": "\n", "hardbreak": "\n", "html_inline": " "}
    return "".join(
        instead.get(child.type, child.content) for child in token.children or () if child.type != "image"
    ).strip()


def _ended(sentence: str, joints: Joints) -> str:
    return sentence if _ENDED.search(sentence) or not sentence else sentence + joints.stop


def _list(items: Sequence[str], joints: Joints) -> str:
    """Short items as one sentence, others as sentences."""
    items = [text for text in (_TASK_BOX.sub("", item) for item in items) if text]
    if all(len(item) <= _SHORT_ITEM_CHARACTERS and not _STOPS.search(item) for item in items):
        return _ended(joints.between_items.join(items), joints)
    return joints.between_sentences.join(_ended(item, joints) for item in items)


def _table(rows: Sequence[Sequence[str]], joints: Joints) -> str:
    """A sentence a row: its first cell, and the others with the names of their columns."""
    head, *body = rows
    spoken = []
    for first, *others in body:
        named = zip(head[1:], others, strict=False)
        cells = [f"{name}{joints.before_cell if name else ''}{cell}" for name, cell in named if cell]
        parts = [part for part in (first, joints.between_cells.join(cells)) if part]
        spoken.append(_ended(joints.behind_first_cell.join(parts), joints))
    return joints.between_sentences.join(spoken)
