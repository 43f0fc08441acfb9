"""The one renderer: a record and a task -> the ids a model is trained on, and the prompt it is served with.

A sample is rendered as prompt + target, by the same two functions for training and for serving, so a served prompt is
always the beginning of what was trained on. The pretraining formats (paper 4.1; control pieces as released):

    text          <s> text | </s>
    continuation  <s> <audio_start> audio | <audio_end> </s>
    interleaved   <s> <audio_start> audio <audio_end> <text_start> text <text_end> ... | </s>
    asr           <s> <|ASR|> <audio_start> audio <audio_end> <text_start> | text <text_end> </s>
    tts           <s> <|TTS|> <text_start> text <text_end> <audio_start> | audio <audio_end> </s>

The target is what stands behind `|`. In text, continuation and interleaved everything teaches, whatever `loss` says.
Conversations (paper 5) are rendered turn by turn, as `data/chat.py` says.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import SpeechLayout, Task
from stepaudio_train.config.sft import AnswerLoss, ChatHistory, ChatTemplate
from stepaudio_train.data.batch import TASKS
from stepaudio_train.data.chat import ChatFormat, TurnError, task_of, turns_of
from stepaudio_train.data.packing import Document
from stepaudio_train.data.records import AudioPart, Record, Span, TextPart, ToolCall
from stepaudio_train.tokenizers.dual import (
    GROUP_SAMPLES,
    TOKENS_PER_GROUP,
    audio_text_to_ids,
    in_layout,
    merge_streams,
    split_streams,
)
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Special, Vocabulary

GROUP_S = GROUP_SAMPLES / 16000
"""Seconds of audio that one dual-codebook group stands for."""

_INPUT_TASKS = ("asr", "tts")


class RenderError(UserError):
    """A record does not have what the task needs. The message names the record."""


@dataclass(frozen=True)
class TokenSample:
    """A record and the speech tokens of its recordings."""

    record: Record
    speech: Mapping[str, SpeechTokens] = field(default_factory=dict)
    """By the `audio` field of the record's audio parts."""


@dataclass(frozen=True)
class Renderer:
    """Renders samples in one vocabulary."""

    vocabulary: Vocabulary
    text_tokenizer: TextTokenizer
    speech_layout: SpeechLayout = "interleaved"

    def render(self, sample: TokenSample, task: Task, loss: Literal["all", "target"] = "all") -> Document:
        """A training document.

        Args:
            loss: what teaches: every token, or only the target behind the task's input.

        Raises:
            RenderError: the record does not have what the task needs.
        """
        prompt = self.render_prompt(sample, task)
        target = self._target(sample, task)
        ids = np.concatenate([prompt, target])
        loss_weights = np.ones(len(ids), np.float32)
        if loss == "target" and task in _INPUT_TASKS:
            loss_weights[: len(prompt)] = 0
        return Document(ids, loss_weights, TASKS.index(task))

    def render_prompt(self, sample: TokenSample, task: Task) -> NDArray[np.int32]:
        """The ids of `render` without the target: what a model is served with. Needs nothing of the target.

        Raises:
            RenderError: the record does not have what the task needs.
        """
        if task == "text":
            return _ids(Special.BOS, self._text(sample))
        if task == "continuation":
            return _ids(Special.BOS, Special.AUDIO_START, self._audio(sample))
        if task == "interleaved":
            return _ids(Special.BOS, *self._interleaved(sample))
        if task == "asr":
            audio = self._audio(sample)
            return _ids(*(Special.BOS, Special.ASR, Special.AUDIO_START), audio, Special.AUDIO_END, Special.TEXT_START)
        if task == "tts":
            text = self._text(sample)
            return _ids(*(Special.BOS, Special.TTS, Special.TEXT_START), text, Special.TEXT_END, Special.AUDIO_START)
        raise RenderError(f"{sample.record.id}: task {task!r} cannot be rendered yet")

    def render_chat(
        self, sample: TokenSample, template: ChatTemplate, loss: AnswerLoss = "last", history: ChatHistory = "text"
    ) -> Document:
        """A training document of a conversation. The assistant's answers teach, each with the `<|EOT|>` that ends it.

        Args:
            loss: whether all answers teach, or the last one alone (paper 5.2).
            history: whether earlier recordings of a dialogue go in as their transcripts (paper 5.2.1).

        Raises:
            RenderError: the conversation does not end with an answer, or cannot be rendered.
        """
        last = sample.record.messages[-1].role
        if last != "assistant":
            raise RenderError(f"{sample.record.id}: ends with a turn of {last}, not with an answer")
        ids, answers = self._turns(sample, template, history)
        loss_weights = np.zeros(len(ids), np.float32)
        for answer in answers if loss == "all" else answers[-1:]:
            loss_weights[answer] = 1
        return Document(ids, loss_weights, TASKS.index(task_of(sample.record)))

    def render_chat_prompt(
        self, sample: TokenSample, template: ChatTemplate, history: ChatHistory = "text"
    ) -> NDArray[np.int32]:
        """The ids up to the assistant's next answer: what a model is served with. A last answer is not looked at.

        Raises:
            RenderError: the conversation cannot be rendered, or leaves nothing to answer.
        """
        record = sample.record
        if record.messages[-1].role == "assistant":
            record = replace(record, messages=record.messages[:-1])
        if not record.messages or record.messages[-1].role not in ("human", "tool"):
            raise RenderError(f"{record.id}: has no turn to answer")
        ids, _ = self._turns(replace(sample, record=record), template, history)
        return _ids(ids, ChatFormat(template, self.text_tokenizer).opening("assistant"))

    def _turns(
        self, sample: TokenSample, template: ChatTemplate, history: ChatHistory
    ) -> tuple[NDArray[np.int32], list[slice]]:
        chat = ChatFormat(template, self.text_tokenizer)
        try:
            messages = turns_of(sample.record, audio_history=history == "audio")
            return chat.render(messages, lambda part: self._audio_of(sample, part))
        except TurnError as error:
            raise RenderError(f"{sample.record.id}: {error}") from None

    def _target(self, sample: TokenSample, task: Task) -> NDArray[np.int32]:
        if task == "continuation":
            return _ids(Special.AUDIO_END, Special.EOS)
        if task == "asr":
            return _ids(self._text(sample), Special.TEXT_END, Special.EOS)
        if task == "tts":
            return _ids(self._audio(sample), Special.AUDIO_END, Special.EOS)
        return _ids(Special.EOS)

    def _interleaved(self, sample: TokenSample) -> list[ArrayLike]:
        """Aligned spans, alternately as audio and as text. Which kind comes first depends on the record's id alone."""
        part = _audio_part(sample.record)
        if self.speech_layout != "interleaved":
            raise RenderError(
                f"{sample.record.id}: spans of audio and text need data.speech_layout=interleaved, not "
                f"{self.speech_layout}; leave the task `interleaved` out of the blend"
            )
        if len(part.spans) < 2:
            raise RenderError(f"{sample.record.id}: interleaving needs at least two aligned spans")
        audio = self._audio(sample)
        speak = zlib.crc32(sample.record.id.encode()) % 2 == 0
        pieces: list[ArrayLike] = []
        for span in part.spans:
            stretch = audio[_groups(span, len(audio))]
            if speak and len(stretch):
                pieces += [Special.AUDIO_START, stretch, Special.AUDIO_END]
            else:
                pieces += [Special.TEXT_START, self.text_tokenizer.encode(span.text), Special.TEXT_END]
            speak = not speak
        return pieces

    def _audio(self, sample: TokenSample) -> NDArray[np.int64]:
        """Ids of the record's one recording."""
        return self._audio_of(sample, _audio_part(sample.record))

    def _audio_of(self, sample: TokenSample, part: AudioPart) -> NDArray[np.int64]:
        """Ids of a recording, five for every 0.12 s; fewer where the layout leaves out a stream."""
        try:
            if part.tokens is not None:
                ids = audio_text_to_ids(part.tokens, self.vocabulary)
                split_streams(ids, self.vocabulary)
                # What ends within a group was cut off somewhere, and nothing like it comes out of a tokenizer.
                if len(ids) % TOKENS_PER_GROUP:
                    raise ValueError(f"{len(ids)} audio tokens are no whole number of groups of {TOKENS_PER_GROUP}")
            elif part.audio in sample.speech:
                tokens = sample.speech[part.audio]
                ids = merge_streams(tokens.linguistic, tokens.semantic, self.vocabulary)
            else:
                raise RenderError(f"{sample.record.id}: has no speech tokens for its audio {part.audio!r}")
        except ValueError as error:
            raise RenderError(f"{sample.record.id}: {error}") from None
        if not len(ids):
            raise RenderError(f"{sample.record.id}: its audio is shorter than {GROUP_S:g} s, the length of one group")
        return in_layout(ids, self.speech_layout)

    def _text(self, sample: TokenSample) -> list[int]:
        """Of a recording, the transcript: the text task can train on speech corpora as well."""
        text = _only_part(sample.record).text
        if not text:
            raise RenderError(f"{sample.record.id}: has no text")
        return self.text_tokenizer.encode(text)


def _only_part(record: Record) -> TextPart | AudioPart:
    parts = [part for message in record.messages for part in message.content if not isinstance(part, ToolCall)]
    if len(parts) != 1:
        raise RenderError(f"{record.id}: pretraining tasks take records of one part, this one has {len(parts)}")
    return parts[0]


def _audio_part(record: Record) -> AudioPart:
    part = _only_part(record)
    if not isinstance(part, AudioPart):
        raise RenderError(f"{record.id}: the task takes a recording, and this is a text")
    return part


def _groups(span: Span, num_ids: int) -> slice:
    """The ids of a span: cut at the group boundaries nearest to its ends, so that neighbours never share a group."""
    first, last = (round(time_s / GROUP_S) * TOKENS_PER_GROUP for time_s in (span.start_s, span.end_s))
    return slice(min(first, num_ids), min(last, num_ids))


def _ids(*pieces: ArrayLike) -> NDArray[np.int32]:
    return np.concatenate([np.atleast_1d(np.asarray(piece, np.int32)) for piece in pieces])
