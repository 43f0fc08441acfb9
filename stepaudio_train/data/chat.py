"""Turns of a conversation as ids, in the two released formats (formats.md 2.3, 2.4).

    tts   <s> <|BOT|> system\\n content <|EOT|> <|BOT|> human\\n content <|EOT|> <|BOT|> assistant\\n content <|EOT|>
    chat  <s> <|BOT|>system\\n content <|EOT|> <|BOT|>human\\n content <|EOT|> <|BOT|>assistant\\n content <|EOT|>

They differ in the space before the role, which makes another id of it. Content is text and the bare ids of audio, in
the order of the parts. `data/render.py` is the door to this: the ids that train and those that serve come from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepaudio_train.config.sft import ChatTemplate
from stepaudio_train.data.records import AudioPart, Message, Part, Role, TextPart
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Special

_OPENINGS: dict[ChatTemplate, str] = {"tts": "<|BOT|> {role}\n", "chat": "<|BOT|>{role}\n"}
_FOLLOWS: dict[Role | None, tuple[Role, ...]] = {
    None: ("system", "human"),
    "system": ("human",),
    "human": ("assistant",),
    "assistant": ("human", "tool"),
    "tool": ("tool", "assistant"),
}
_FRAME = (Special.BOS, Special.BOT, Special.EOT)


class TurnError(ValueError):
    """A conversation that cannot be rendered. The message names the turn, not the conversation."""


@dataclass(frozen=True)
class ChatFormat:
    """One template in one vocabulary."""

    template: ChatTemplate
    text_tokenizer: TextTokenizer

    def opening(self, role: Role) -> list[int]:
        """`<|BOT|>`, the role and the line's end."""
        return self.text_tokenizer.encode(_OPENINGS[self.template].format(role=role))

    def render(
        self, messages: Sequence[Message], speak: Callable[[AudioPart], ArrayLike]
    ) -> tuple[NDArray[np.int32], list[slice]]:
        """Ids of whole turns behind `<s>`, and where the assistant's answers, each with its `<|EOT|>`, stand in them.

        Args:
            speak: ids of a recording.

        Raises:
            TurnError: a turn that may not follow the one before, is empty, or holds a piece that begins or ends turns.
        """
        require_order(messages)
        pieces: list[NDArray[np.int32]] = [np.asarray([Special.BOS], np.int32)]
        answers = []
        position = 1
        for number, message in enumerate(messages, 1):
            opening, content = self.opening(message.role), self._content(number, message, speak)
            pieces += [np.asarray(opening, np.int32), content, np.asarray([Special.EOT], np.int32)]
            start, position = position + len(opening), position + len(opening) + len(content) + 1
            if message.role == "assistant":
                answers.append(slice(start, position))
        return np.concatenate(pieces), answers

    def _content(self, number: int, message: Message, speak: Callable[[AudioPart], ArrayLike]) -> NDArray[np.int32]:
        pieces: list[ArrayLike] = []
        # Texts that stand together are encoded together, as in the one string that the released programs encode.
        for kind, parts in groupby(message.content, type):
            if kind is TextPart:
                pieces.append(self._text(number, message.role, parts))
            else:
                pieces += [speak(part) for part in parts if isinstance(part, AudioPart)]
        content = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
        if not len(content):
            raise TurnError(f"turn {number} ({message.role}) is empty")
        return content

    def _text(self, number: int, role: Role, parts: Iterable[Part]) -> list[int]:
        text = "".join(part.text or "" for part in parts)
        # Behind a line's end the first word gets no word mark, as in the released programs.
        line_end = self.text_tokenizer.encode("\n")
        ids = self.text_tokenizer.encode("\n" + text)[len(line_end) :]
        for special in _FRAME:
            if special in ids:
                piece = self.text_tokenizer.decode([int(special)])
                raise TurnError(f"turn {number} ({role}) has {piece} in its text, which frames turns")
        return ids


def require_order(messages: Sequence[Message]) -> None:
    """See that turns go [system] human assistant human assistant ..., with tools' results behind an answer.

    Raises:
        TurnError: at the first turn that does not.
    """
    before: Role | None = None
    for number, message in enumerate(messages, 1):
        if message.role not in _FOLLOWS[before]:
            after = f"after {before}" if before else "at the beginning"
            allowed = " or ".join(_FOLLOWS[before])
            raise TurnError(f"turn {number} is {message.role}: {after} comes {allowed}")
        before = message.role
