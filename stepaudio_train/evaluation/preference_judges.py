"""Who says which answer is better, where no person does: rules, or a language model behind an endpoint (paper 5.2).

Judges read. Of a recording they read what it says, its `text`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Protocol, TypeVar

from stepaudio_train.data.chat import tool_call_text
from stepaudio_train.data.chat_endpoint import ChatEndpoint, ReplyError
from stepaudio_train.data.preference_files import HIGHEST_RATING, LOWEST_RATING, Preference
from stepaudio_train.data.records import AudioPart, Message, ToolCall
from stepaudio_train.data.rewriting import language_of
from stepaudio_train.evaluation.word_errors import normalise

_CRITERIA = """You judge answers of a voice assistant. A good answer does what the last turn of the conversation asks \
for, is correct, sounds natural when it is said aloud, and harms nobody. An answer that asks to repeat what was said \
clearly, or avoids an answer that it could give, is bad. Where a reference is given, it is the right answer. The \
length of an answer is no merit."""
_RATE = f"""{_CRITERIA}
Rate the answer: 1 is useless or harmful, 2 poor, 3 acceptable, 4 good, 5 as good as can be. Reply with the JSON \
object {{"rating": N}} and nothing else."""
_COMPARE = f"""{_CRITERIA}
Say which of the two answers is better. Reply with the JSON object {{"better": "first"}}, {{"better": "second"}} or \
{{"better": "neither"}} and nothing else."""
_WON = {"first": 1.0, "second": 0.0, "neither": 0.5}

T = TypeVar("T")


class JudgementError(ValueError):
    """One prompt that a judge cannot judge. The message says why, and names no file."""


class PreferenceJudge(Protocol):
    """Rates answers. Several threads may call it at once."""

    def rate(self, preference: Preference) -> list[float]:
        """1 to 5 for each answer, in order.

        Raises:
            JudgementError: not of this prompt.
            UserError: of none.
        """
        ...


@dataclass(frozen=True)
class RuleJudge:
    """Rates by the weighted share of the rules that an answer keeps: none is 1, all are 5."""

    min_words: int = 0
    max_words: int | None = None
    """A Chinese character is a word."""
    language: str | None = None
    """`en` or `zh`."""
    reference_weight: float = 1.0
    """Of being the prompt's reference word for word, where it has one."""
    length_weight: float = 1.0
    language_weight: float = 1.0

    def rate(self, preference: Preference) -> list[float]:
        """See `PreferenceJudge`."""
        rules = self._rules(preference)
        if not rules:
            raise JudgementError("no rule applies; give it a `reference`, or type --max-words or --language")
        total = sum(weight for _, weight in rules)
        answers = [normalise(text) for text in _answers(preference)]
        kept = [sum(weight for rule, weight in rules if rule(answer)) / total for answer in answers]
        return [_rating(share) for share in kept]

    def _rules(self, preference: Preference) -> list[tuple[Callable[[str], bool], float]]:
        """Those that apply, on normalised text, with their weights."""
        rules: list[tuple[Callable[[str], bool], float]] = []
        if preference.reference:
            reference = normalise(preference.reference)
            rules.append((lambda answer: answer == reference, self.reference_weight))
        if self.min_words or self.max_words is not None:
            most = self.max_words
            rules.append(
                (
                    lambda answer: (
                        len(answer.split()) >= self.min_words and (most is None or len(answer.split()) <= most)
                    ),
                    self.length_weight,
                )
            )
        if self.language is not None:
            rules.append((lambda answer: language_of(answer) == self.language, self.language_weight))
        return [rule for rule in rules if rule[1] > 0]


@dataclass(frozen=True)
class EndpointJudge:
    """Asks a model to rate each answer, or to compare each two of them, in both orders."""

    endpoint: ChatEndpoint
    compare: bool = False
    """Rate by the share of comparisons won, draws counting half: none is 1, all are 5."""

    def rate(self, preference: Preference) -> list[float]:
        """See `PreferenceJudge`."""
        answers = _answers(preference)
        turns = [{"role": message.role, "text": _said(message)} for message in preference.prompt.messages]
        asked: dict[str, Any] = {"conversation": turns}
        if preference.reference:
            asked["reference"] = preference.reference
        if not self.compare:
            return [self._ask(_RATE, {**asked, "answer": answer}, _rating_of) for answer in answers]
        won = [0.0] * len(answers)
        # Models favour a place: each two are compared in both orders.
        for first, second in permutations(range(len(answers)), 2):
            share = self._ask(_COMPARE, {**asked, "first": answers[first], "second": answers[second]}, _winner_of)
            won[first], won[second] = won[first] + share, won[second] + 1 - share
        return [_rating(points / (2 * (len(answers) - 1))) for points in won]

    def _ask(self, instruction: str, content: dict[str, Any], read: Callable[[str], T]) -> T:
        try:
            return self.endpoint.ask(instruction, content, read)
        except ReplyError as error:
            raise JudgementError(str(error)) from None


def agreement(preference: Preference, ratings: Sequence[float]) -> list[float]:
    """For each pair that was given or rated already: 1 if `ratings` order it alike, 0.5 if they do not tell, else 0."""
    pairs = [(ratings[better], ratings[worse]) for better, worse, _ in preference.ordered(min_difference=1e-6)]
    return [0.5 if better == worse else float(better > worse) for better, worse in pairs]


def _answers(preference: Preference) -> list[str]:
    """What each answer says.

    Raises:
        JudgementError: one cannot be read, or there is nothing to compare.
    """
    if len(preference.answers) < 2:
        raise JudgementError("has one answer; a preference needs two or more")
    said = [_said(answer) for answer in preference.answers]
    for number, (answer, text) in enumerate(zip(preference.answers, said, strict=True), 1):
        if any(isinstance(part, AudioPart) and not part.text for part in answer.content):
            raise JudgementError(f"answer {number}: its recording needs its transcript in `text`, since judges read")
        if not text.strip():
            raise JudgementError(f"answer {number} is empty")
    return said


def _said(message: Message) -> str:
    """What is written in a turn, what its recordings say, and its calls of tools."""
    texts = (tool_call_text(part).strip() if isinstance(part, ToolCall) else part.text for part in message.content)
    return "\n".join(text or "(a recording without a transcript)" for text in texts)


def _rating(share: float) -> float:
    return LOWEST_RATING + (HIGHEST_RATING - LOWEST_RATING) * share


def _rating_of(reply: str) -> float:
    rating = _object_in(reply).get("rating")
    if isinstance(rating, bool) or not isinstance(rating, int | float):
        raise ReplyError(f"the endpoint's reply gives no rating: {reply[:80]!r}")
    if not LOWEST_RATING <= rating <= HIGHEST_RATING:
        raise ReplyError(f"the endpoint's rating is not 1 to 5: {reply[:80]!r}")
    return float(rating)


def _winner_of(reply: str) -> float:
    """1 if the first one is better, 0 if the second one is, else 0.5."""
    better = _object_in(reply).get("better")
    if not isinstance(better, str) or better not in _WON:
        raise ReplyError(f"the endpoint's reply names no better answer: {reply[:80]!r}")
    return _WON[better]


def _object_in(reply: str) -> dict[str, Any]:
    """The last JSON object in a reply: models like to explain themselves."""
    for found in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            return json.loads(found)
        except ValueError:
            continue
    return {}
