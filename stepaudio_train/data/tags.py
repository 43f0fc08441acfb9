"""Instruction tags: how a text is to be spoken, in parentheses before it (paper 5.1; spellings of formats.md 2.4).

    （高兴2）今天天气真好      (happy 2, fast 1) what a day      (RAP)我踏上自由的征途

Descriptive tags say what kind of voice: a language, a dialect, a cute voice, RAP, singing. Comparative ones say how
much of it, in five levels. A group of parentheses holds one tag or several, with commas between them; groups may follow
each other. Spellings are not case-sensitive, and a blank before the level may stand or not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stepaudio_train.config.errors import UserError

Kind = Literal["language", "style", "comparative"]
LEVELS = range(1, 6)

_GROUP = re.compile(r"\s*[（(]([^（）()]*)[）)]")
_SEPARATOR = re.compile(r"[,，、;；]")
_SPELLING = re.compile(r"(?P<name>.*?\D)\s*(?P<level>\d+)?")


class TagError(UserError):
    """A text asks for a tag that there is not, or for a level outside 1 to 5."""


@dataclass(frozen=True)
class Tag:
    """One thing that can be asked for."""

    english: str
    chinese: str
    kind: Kind
    aliases: tuple[str, ...] = ()
    takes_level: bool = False

    def spellings(self) -> tuple[str, ...]:
        """Every way to write it, without a level, in lower case."""
        return tuple(spelling.lower() for spelling in (self.english, self.chinese, *self.aliases))


@dataclass(frozen=True)
class AskedTag:
    """A tag and, where one is asked for, its level."""

    tag: Tag
    level: int | None = None

    def spell(self, language: Literal["en", "zh"]) -> str:
        """`fast 2`, or as released `快速2`."""
        level = "" if self.level is None else str(self.level)
        return f"{self.tag.english} {level}".strip() if language == "en" else f"{self.tag.chinese}{level}"


def _language(english: str, chinese: str, *aliases: str) -> Tag:
    return Tag(english, chinese, "language", aliases)


def _comparative(english: str, chinese: str, *aliases: str) -> Tag:
    return Tag(english, chinese, "comparative", aliases, takes_level=True)


TAGS = (
    _language("Chinese", "中文", "Mandarin", "普通话"),
    _language("English", "英文", "英语"),
    _language("Japanese", "日语"),
    _language("Korean", "韩语"),
    _language("Cantonese", "粤语", "广东话"),
    _language("Sichuanese", "四川话"),
    # Called descriptive by the paper, and yet the released prompt lists it with a level.
    Tag("cute", "撒娇", "style", takes_level=True),
    Tag("RAP", "RAP", "style"),
    Tag("singing", "哼唱", "style", ("humming",)),
    _comparative("happy", "高兴"),
    _comparative("angry", "生气"),
    _comparative("sad", "悲伤"),
    _comparative("fast", "快速"),
    _comparative("slow", "慢速"),
)
"""The paper's tags in the released spellings."""


class TagVocabulary:
    """The tags of a run: the paper's, and a user's own."""

    def __init__(self, own: Iterable[str] = ()) -> None:
        """Args:
        own: further tags, each written as in a text (`whisper`), or with ` 1-5` behind it where it has levels.

        Raises:
            TagError: a name is empty, or is there already.
        """
        self._by_spelling = {spelling: tag for tag in TAGS for spelling in tag.spellings()}
        for entry in own:
            name = entry.removesuffix("1-5").strip()
            if not name or name.lower() in self._by_spelling:
                raise TagError(f"tag {entry!r}: {'is there already' if name else 'has no name'}")
            self._by_spelling[name.lower()] = Tag(name, name, "style", takes_level=entry != name)

    def parse(self, text: str) -> tuple[tuple[AskedTag, ...], str]:
        """The tags before a text, and the text without them.

        Raises:
            TagError: an unknown tag, or a level that it does not have.
        """
        asked: list[AskedTag] = []
        position = 0
        while group := _GROUP.match(text, position):
            asked += [self._asked(spelling.strip()) for spelling in _SEPARATOR.split(group[1])]
            position = group.end()
        return tuple(asked), text[position:].lstrip() if asked else text

    def tag(self, spelling: str) -> Tag:
        """The tag of a spelling without a level.

        Raises:
            TagError: there is none; the message names the nearest.
        """
        found = self._by_spelling.get(spelling.lower())
        if found is None:
            near = difflib.get_close_matches(spelling.lower(), self._by_spelling, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TagError(
                f"({spelling}): no such tag; {hint}a tag of your own is declared by data.own_tags=[{spelling}]"
            )
        return found

    def _asked(self, spelling: str) -> AskedTag:
        parsed = _SPELLING.fullmatch(spelling)
        if parsed is None:
            raise TagError(f"({spelling}): is no tag")
        tag, level = self.tag(parsed["name"].strip()), parsed["level"]
        if level is None:
            return AskedTag(tag)
        if not tag.takes_level or int(level) not in LEVELS:
            levels = f"levels from {LEVELS[0]} to {LEVELS[-1]}" if tag.takes_level else "no levels"
            raise TagError(f"({spelling}): {tag.english} has {levels}")
        return AskedTag(tag, int(level))


def tagged(asked: Sequence[AskedTag], text: str, language: Literal["en", "zh"] = "en") -> str:
    """`text` with its tags before it, as released: one group of parentheses, wide ones in Chinese."""
    if not asked:
        return text
    comma, left, right = (", ", "(", ")") if language == "en" else ("，", "（", "）")
    return f"{left}{comma.join(one.spell(language) for one in asked)}{right}{text}"
