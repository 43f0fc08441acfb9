"""Turns of a conversation as ids, in the released formats (formats.md 2.3, 2.4).

    tts   <s> <|BOT|> system\\n content <|EOT|> <|BOT|> human\\n content <|EOT|> <|BOT|> assistant\\n content <|EOT|>
    chat  <s> <|BOT|>system\\n content <|EOT|> <|BOT|>human\\n content <|EOT|> <|BOT|>assistant\\n content <|EOT|>

They differ in the space before the role, which makes another id of it. A third, tts_bos, is tts with `<s>` behind every
`<|BOT|>`: what StepFun's tts.py feeds with the transformers it pins. Content is text and the bare ids of audio, in
the order of the parts. `data/render.py` is the door to this: the ids that train and those that serve come from here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepaudio_train.config.sft import ChatTask, ChatTemplate
from stepaudio_train.data.prompts import ASR_PROMPT
from stepaudio_train.data.records import AudioPart, Message, Part, Record, Role, TextPart, ToolCall
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Special

SPEECH_TASKS: tuple[ChatTask, ...] = ("asr", "tts", "edit")
"""In these an earlier recording is the voice to speak in, or what to edit; the others are dialogues."""
_OPENINGS: dict[ChatTemplate, str] = {
    "tts": "<|BOT|> {role}\n",
    "tts_bos": "<|BOT|><s> {role}\n",
    "chat": "<|BOT|>{role}\n",
}
_FOLLOWS: dict[Role | None, tuple[Role, ...]] = {
    None: ("system", "human", "tool_json_schemas"),
    "system": ("human", "tool_json_schemas"),
    "tool_json_schemas": ("human",),
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
        for spoken, parts in groupby(message.content, lambda part: isinstance(part, AudioPart)):
            if spoken:
                pieces += [speak(part) for part in parts if isinstance(part, AudioPart)]
            else:
                pieces.append(self._text(number, message.role, parts))
        content = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
        if not len(content):
            raise TurnError(f"turn {number} ({message.role}) is empty")
        return content

    def _text(self, number: int, role: Role, parts: Iterable[Part]) -> list[int]:
        text = "".join(map(_text_of, parts))
        # Behind a line's end the first word gets no word mark, as in the released programs.
        line_end = self.text_tokenizer.encode("\n")
        ids = self.text_tokenizer.encode("\n" + text)[len(line_end) :]
        for special in _FRAME:
            if special in ids:
                piece = self.text_tokenizer.decode([int(special)])
                raise TurnError(f"turn {number} ({role}) has {piece} in its text, which frames turns")
        return ids


def task_of(record: Record) -> ChatTask:
    """What a conversation teaches: what it says itself, or else what its last question and answer are made of."""
    if record.task is not None:
        return record.task
    parts = [part for message in record.messages for part in message.content]
    if record.tools or any(isinstance(part, ToolCall) for part in parts) or _last(record.messages, "tool"):
        return "tool"
    question, answer = _last(record.messages, "human"), _last(record.messages, "assistant")
    heard = _has_audio(question)
    if _has_audio(answer):
        return "aqaa" if heard else "tts"
    if heard:
        return "asr" if _texts(_last(record.messages, "system")) == ASR_PROMPT else "aqta"
    return "tqta"


def turns_of(record: Record, audio_history: bool = False) -> tuple[Message, ...]:
    """A conversation's turns as they are rendered (paper 5.2).

    Tools get a turn of their own, earlier recordings of a dialogue are replaced by their transcripts, and what TAQTA's
    recording says comes before the answer.

    Args:
        audio_history: leave earlier recordings as they are.

    Raises:
        TurnError: a transcript is missing, or the conversation is not of the kind that its task says.
    """
    messages = record.messages
    if record.task is not None:
        _require_kind(record.task, messages)
    if not audio_history and is_dialogue(record):
        messages = history_as_text(messages)
    if record.task == "taqta":
        messages = _with_transcript(messages)
    if record.tools:
        behind = 1 if messages and messages[0].role == "system" else 0
        schemas = Message("tool_json_schemas", (TextPart(json.dumps(record.tools, ensure_ascii=False)),))
        messages = (*messages[:behind], schemas, *messages[behind:])
    return messages


def history_as_text(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The turns with every recording before the last question replaced by its transcript (paper 5.2.1).

    Raises:
        TurnError: a recording comes without its transcript.
    """
    last = max((place for place, message in enumerate(messages) if message.role == "human"), default=0)
    earlier = [
        replace(m, content=tuple(_written(number, p) for p in m.content)) for number, m in enumerate(messages[:last], 1)
    ]
    return (*earlier, *messages[last:])


def require_order(messages: Sequence[Message]) -> None:
    """See that turns go [system] human assistant human assistant ..., with tools' results behind an answer.

    Raises:
        TurnError: at the first turn that does not.
    """
    before: Role | None = None
    for number, message in enumerate(messages, 1):
        if message.role not in _FOLLOWS[before]:
            after = f"after {before}" if before else "at the beginning"
            allowed = " or ".join(role for role in _FOLLOWS[before] if role != "tool_json_schemas")
            raise TurnError(f"turn {number} is {message.role}: {after} comes {allowed}")
        before = message.role


def is_dialogue(record: Record) -> bool:
    """Whether earlier recordings go in as their transcripts.

    Without a task, where a human speaks: what the assistant alone says aloud is a voice to speak in.
    """
    # Never told by the answer, which is not there when the same conversation is served.
    if record.task is not None:
        return record.task not in SPEECH_TASKS
    return any(_has_audio(message) for message in record.messages if message.role == "human")


_KINDS: dict[ChatTask, tuple[str, str]] = {
    "asr": ("audio", "text"),
    "tts": ("text", "audio"),
    "tqta": ("text", "text"),
    "aqta": ("audio", "text"),
    "taqta": ("text and audio", "text"),
    "aqaa": ("audio", "audio"),
    "edit": ("text and audio", "audio"),
}
"""Task -> what its last question must hold, and what its last answer."""


def _require_kind(task: ChatTask, messages: Sequence[Message]) -> None:
    if task in _KINDS:
        answer = messages[-1] if messages and messages[-1].role == "assistant" else None
        for turn, kind in zip((_last(messages, "human"), answer), _KINDS[task], strict=True):
            holds = {"audio": _has_audio(turn), "text": bool(_texts(turn).strip())}
            missing = [one for one in kind.split(" and ") if not holds[one]]
            if turn is not None and (missing or (kind == "text" and holds["audio"])):
                raise TurnError(f"task {task}: the last turn of {turn.role} must hold {kind}")
    elif task == "role_play" and not (messages and messages[0].role == "system"):
        raise TurnError("task role_play: the first turn must be the system's, which says what to play")


def _with_transcript(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The answer with what the question's recordings say before it."""
    answer = messages[-1]
    if answer.role != "assistant":
        return messages
    question = _last(messages, "human")
    heard = [part.text for part in question.content if isinstance(part, AudioPart)] if question else []
    if not all(heard):
        raise TurnError("task taqta: the question's audio needs its transcript in `text`: it is what is answered first")
    transcript = "\n".join(text or "" for text in heard)
    if _texts(answer).startswith(transcript):
        return messages
    return (*messages[:-1], replace(answer, content=(TextPart(f"{transcript}\n"), *answer.content)))


def _written(number: int, part: Part) -> Part:
    if not isinstance(part, AudioPart):
        return part
    if not part.text:
        raise TurnError(
            f"turn {number}: its audio needs its transcript in `text`, since earlier turns go in as text; "
            "type data.history=audio to leave them as they are"
        )
    return TextPart(part.text)


def _text_of(part: Part) -> str:
    if isinstance(part, ToolCall):
        return f"<|CALL_START|>{tool_call_text(part)}<|CALL_END|>"
    return part.text or ""


def tool_call_text(call: ToolCall) -> str:
    """A call as the released chat model writes it, without the control pieces around it (formats.md 2.4)."""
    return f" function\n{call.name}\n{json.dumps(call.arguments, ensure_ascii=False)}"


def _last(messages: Sequence[Message], role: str) -> Message | None:
    return next((message for message in reversed(messages) if message.role == role), None)


def _has_audio(message: Message | None) -> bool:
    return message is not None and any(isinstance(part, AudioPart) for part in message.content)


def _texts(message: Message | None) -> str:
    return "".join(part.text for part in message.content if isinstance(part, TextPart)) if message else ""
