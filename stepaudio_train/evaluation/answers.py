"""Answers of a fine-tuned model to held-out conversations, and their scores beside those for exchanged recordings.

A model that does not listen scores as well on exchanged recordings as on the right ones.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepaudio_train.config.sft import ChatHistory, ChatTemplate
from stepaudio_train.data.chat import TurnError, task_of, tool_call_text, turns_of
from stepaudio_train.data.conversation_files import EncodedConversations
from stepaudio_train.data.records import AudioPart, Message, Record, ToolCall
from stepaudio_train.data.render import Renderer, RenderError, TokenSample
from stepaudio_train.data.sources import Refusal
from stepaudio_train.evaluation.word_errors import normalise, word_error_rate
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import Answer, SpeechTextModel
from stepaudio_train.tokenizers.dual import audio_ids_to_text, merge_streams
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Answered:
    """A conversation and what the model answered."""

    sample: TokenSample
    answer: Answer

    @property
    def task(self) -> str:
        return task_of(self.sample.record)

    @property
    def reference(self) -> str:
        """See `expected_text`."""
        return expected_text(self.sample.record)

    def line(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """For answers.jsonl: with the record's `meta`, what `stepaudio evaluate control` takes."""
        line: dict[str, Any] = {"id": self.sample.record.id, "task": self.task, "reference": self.reference}
        line |= {"answer": self.answer.text, "ended": self.answer.ended}
        if self.answer.speech is not None:
            line["audio_tokens"] = _written(self.answer.speech, vocabulary)
        return {**self.sample.record.meta, **line}


@dataclass(frozen=True)
class Scores:
    """How good the written answers of a task are."""

    num: int
    wer: float
    """Percent."""
    exact: float
    """Percent of answers that are the reference word for word."""


def expected_text(record: Record) -> str:
    """The written answer that a conversation ends with, as it is taught, or what the spoken one says."""
    # As `Answer.text` has it: stripped, and of a call what is left without the control pieces around it.
    last = turns_of(record, audio_history=True)[-1]
    parts = (tool_call_text(p) if isinstance(p, ToolCall) else p.text or "" for p in last.content)
    return "".join(parts).strip()


def answer_all(
    model: SpeechTextModel,
    samples: Sequence[TokenSample],
    sampling: SamplingConfig,
    template: ChatTemplate,
    history: ChatHistory,
    seed: int = 0,
    written_temperature: float = 0.0,
) -> list[Answered]:
    """Answer every conversation, in their order.

    Args:
        sampling: of spoken answers.
        written_temperature: of written ones, in its place; 0 takes the most likely tokens.
    """
    written = replace(sampling, temperature=written_temperature)
    answered: dict[int, Answered] = {}
    for config, chosen in ((written, _indices(samples, True)), (sampling, _indices(samples, False))):
        seeds = [seed + i for i in chosen]
        answers = model.answer([samples[i] for i in chosen], config, template, history, seeds)
        answered |= {i: Answered(samples[i], answer) for i, answer in zip(chosen, answers, strict=True)}
    return [answered[index] for index in range(len(samples))]


def is_spoken(sample: TokenSample) -> bool:
    """Whether the conversation's own answer is. Written answers take the most likely tokens, spoken ones are drawn."""
    last = sample.record.messages[-1]
    return last.role == "assistant" and any(isinstance(part, AudioPart) for part in last.content)


def answerable(
    found: EncodedConversations, renderer: Renderer, template: ChatTemplate, history: ChatHistory
) -> tuple[list[TokenSample], list[Refusal]]:
    """The conversations that can be put to a model, and the lines that cannot, each with the reason.

    An answer that is there must be one of its task: what a model says is compared with it.
    """
    samples, refused = [], list(found.refused)
    for where, sample in found.samples:
        try:
            renderer.render_chat_prompt(sample, template, history)
            turns_of(sample.record, audio_history=True)
        except (RenderError, TurnError) as error:
            refused.append(Refusal(where, str(error).removeprefix(f"{sample.record.id}: ")))
        else:
            samples.append(sample)
    return samples, refused


def score(answered: Sequence[Answered]) -> dict[str, Scores]:
    """By task, of the written answers whose references have words."""
    by_task: dict[str, list[Answered]] = defaultdict(list)
    for one in answered:
        if not is_spoken(one.sample) and normalise(one.reference):
            by_task[one.task].append(one)
    return {task: _scores(found) for task, found in sorted(by_task.items())}


def with_exchanged_audio(samples: Sequence[TokenSample], seed: int = 0) -> list[TokenSample]:
    """The conversations whose last question is heard, each with the recordings of another one's question of its task.

    A task with one such conversation alone is left out.
    """
    groups: dict[str, list[TokenSample]] = defaultdict(list)
    for sample in samples:
        if _heard(sample.record):
            groups[task_of(sample.record)].append(sample)
    exchanged = []
    for _, group in sorted(groups.items()):
        order = group.copy()
        random.Random(seed).shuffle(order)
        if len(order) > 1:  # a rotation of a random order: nobody keeps their own
            exchanged += [_with_audio_of(one, other) for one, other in zip(order, order[1:] + order[:1], strict=True)]
    return exchanged


def spoken_line(sample: TokenSample, folder: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    """The record's own spoken answer in the form of `Answered.line`, with its recording."""
    last = sample.record.messages[-1]
    part = next(part for part in last.content if isinstance(part, AudioPart))
    tokens = part.tokens or _written(sample.speech[part.audio], vocabulary)
    line = {"id": sample.record.id, "task": task_of(sample.record), "audio_tokens": tokens}
    return {**sample.record.meta, **line, **({"audio": str(folder / part.audio)} if part.audio else {})}


def _scores(answered: Sequence[Answered]) -> Scores:
    references, answers = [one.reference for one in answered], [one.answer.text for one in answered]
    exact = [normalise(a) == normalise(b) for a, b in zip(references, answers, strict=True)]
    return Scores(len(answered), word_error_rate(references, answers).percent, 100 * sum(exact) / len(exact))


def _indices(samples: Sequence[TokenSample], written: bool) -> list[int]:
    return [i for i, sample in enumerate(samples) if is_spoken(sample) != written]


def _question(record: Record) -> int:
    return max(place for place, message in enumerate(record.messages) if message.role == "human")


def _heard(record: Record) -> list[AudioPart]:
    return [part for part in record.messages[_question(record)].content if isinstance(part, AudioPart)]


def _with_audio_of(sample: TokenSample, other: TokenSample) -> TokenSample:
    place, others = _question(sample.record), _heard(other.record)
    message = sample.record.messages[place]
    given = iter(others * len(message.content))
    # What it is said to say stays: TAQTA's reference begins with it.
    content = tuple(
        replace(next(given), text=part.text) if isinstance(part, AudioPart) else part for part in message.content
    )
    messages = list(sample.record.messages)
    messages[place] = Message(message.role, content)
    return TokenSample(replace(sample.record, messages=tuple(messages)), {**sample.speech, **other.speech})


def _written(speech: SpeechTokens, vocabulary: Vocabulary) -> str:
    return audio_ids_to_text(merge_streams(speech.linguistic, speech.semantic, vocabulary), vocabulary)
