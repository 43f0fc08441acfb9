"""A JSONL file of preferences: prompts, each with a chosen and a rejected answer, or with answers that were rated.

{"id": "q1", "messages": [...], "chosen": {"role": "assistant", ...}, "rejected": {"role": "assistant", ...}}
{"id": "q2", "messages": [...], "answers": [{"message": {"role": "assistant", ...}, "rating": 4, "rater": "ann"}, ...]}

Messages, tasks and tools are those of conversations (`data/records.py`); the prompt ends where an answer is due. Lines
of answers with the same id are one prompt: equal answers are one answer, rated by several, and of each rater the last
rating counts. So files that are appended to, and files of several raters behind each other, are files of preferences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from stepaudio_train.data.chat import TurnError, require_order, turns_of
from stepaudio_train.data.records import (
    Message,
    Record,
    RecordError,
    describe_problem,
    parse_record,
    record_to_json,
    with_audio_parts,
)
from stepaudio_train.data.sources import Refusal

_STRICT = ConfigDict(extra="forbid", strict=True)

LOWEST_RATING, HIGHEST_RATING = 1, 5
_Stars = Annotated[float, Field(ge=LOWEST_RATING, le=HIGHEST_RATING)]
_PROMPT_FIELDS = ("id", "messages", "task", "tools", "meta")
_ROUNDING = 1e-9
"""Of means of ratings: 13/3 and 10/3 are 1 apart."""


@dataclass(frozen=True)
class Rating:
    """What one rater says of an answer."""

    __pydantic_config__ = _STRICT

    rating: _Stars | None = None
    """1 to 5, as the paper's raters gave (5.2); None: not rated yet."""
    rater: str = ""
    by_criterion: dict[str, _Stars] = field(default_factory=dict)
    """What `rating` is the mean of, if of anything."""


@dataclass(frozen=True)
class Preference:
    """A prompt and its answers, no two of them equal."""

    where: str
    """File and line, the first one where there are several."""
    prompt: Record
    answers: tuple[Message, ...]
    ratings: tuple[dict[str, Rating], ...]
    """Of each answer, by rater."""
    margin: float | None = None
    """Of a pair, whose first answer is the chosen one. None: who is better follows from the ratings."""
    category: str | None = None
    """What kind of prompt it is, such as `safety`: accuracies are reported by it. None: its task."""
    reference: str | None = None
    """The right answer, for judges."""
    criteria: tuple[str, ...] = ()
    """What people are asked to rate; none: what `stepaudio data rate` asks otherwise."""

    def joined(self) -> Record:
        """The prompt with all answers behind it: never rendered, but its recordings are all that are needed."""
        return replace(self.prompt, messages=(*self.prompt.messages, *self.answers))

    def conversation(self, answer: int) -> Record:
        """The prompt and one answer."""
        return replace(self.prompt, messages=(*self.prompt.messages, self.answers[answer]))

    def mean_rating(self, answer: int) -> float | None:
        """Over its raters; None: nobody has rated it."""
        given = [one.rating for one in self.ratings[answer].values() if one.rating is not None]
        return sum(given) / len(given) if given else None

    def ordered(self, min_difference: float) -> list[tuple[int, int, float]]:
        """(better answer, worse answer, margin) of the given pair, or of all whose mean ratings differ enough."""
        if self.margin is not None:
            return [(0, 1, self.margin)]
        means = [(index, mean) for index in range(len(self.answers)) if (mean := self.mean_rating(index)) is not None]
        ordered = [sorted(pair, key=lambda one: -one[1]) for pair in combinations(means, 2)]
        found = [(better, worse, high - low) for (better, high), (worse, low) in ordered]
        return [one for one in found if one[2] >= min_difference - _ROUNDING]

    def with_ratings_of(self, other: Preference) -> Preference:
        """Both files' answers; where both have a rater's rating of an answer, the other's."""
        answers, ratings = list(self.answers), list(self.ratings)
        for answer, given in zip(other.answers, other.ratings, strict=True):
            if answer in answers:
                place = answers.index(answer)
                ratings[place] = {**ratings[place], **given}
            else:
                answers.append(answer)
                ratings.append(given)
        category, reference = self.category or other.category, self.reference or other.reference
        return replace(self, answers=tuple(answers), ratings=tuple(ratings), category=category, reference=reference)

    def with_recordings(self, name: Callable[[str], str]) -> Preference:
        """The same with other names for its recordings."""
        parts = [replace(p, audio=name(p.audio)) if p.audio else p for p in self.joined().audio_parts()]
        messages, turns = with_audio_parts(self.joined(), parts).messages, len(self.prompt.messages)
        return replace(self, prompt=replace(self.prompt, messages=messages[:turns]), answers=messages[turns:])


@dataclass(frozen=True, kw_only=True)
class _Answer(Rating):
    __pydantic_config__ = _STRICT

    message: Any


@dataclass(frozen=True)
class _Line:
    """Of the prompt and the messages, `parse_record` sees to what they are."""

    __pydantic_config__ = _STRICT

    messages: Any
    id: Any = None
    task: Any = None
    tools: Any = None
    meta: Any = None
    chosen: Any = None
    rejected: Any = None
    margin: Annotated[float, Field(ge=0, lt=math.inf)] = 0.0
    answers: list[_Answer] | None = None
    category: str | None = None
    reference: str | None = None
    criteria: tuple[str, ...] = ()


_LINE = TypeAdapter(_Line)


@dataclass(frozen=True)
class PreferenceFile:
    """The prompts of a file, and the lines that cannot be used."""

    path: Path
    preferences: list[Preference]
    refused: list[Refusal]

    @classmethod
    def read(cls, path: Path) -> PreferenceFile:
        """Read every line; blank ones are skipped. Recordings are not looked for."""
        found: dict[tuple[str, str], Preference] = {}
        refused = []
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    preference = parse_preference(line, where, default_id=f"{path.name}:{number}")
                    key = ("prompt", preference.prompt.id) if preference.margin is None else ("pair", where)
                    found[key] = _together(found[key], preference) if key in found else preference
                except RecordError as error:
                    refused.append(Refusal(where, str(error).removeprefix(f"{where}: ")))
        return cls(path, list(found.values()), refused)


def parse_preference(content: str | bytes, where: str, default_id: str) -> Preference:
    """Read one line.

    Args:
        where: file and line, for errors.
        default_id: of a prompt that has none.

    Raises:
        RecordError: naming `where` and the field that is wrong.
    """
    try:
        line = _LINE.validate_json(content)
    except ValidationError as error:
        raise RecordError(f"{where}: {'; '.join(describe_problem(problem) for problem in error.errors())}") from None
    given = {name: getattr(line, name) for name in _PROMPT_FIELDS if getattr(line, name) is not None}
    prompt = parse_record(json.dumps(given), where, default_id)
    last = prompt.messages[-1].role
    if last not in ("human", "tool"):
        raise RecordError(f"{where}: messages: must end where an answer is due, not with a turn of {last}")
    pair = {"chosen": line.chosen, "rejected": line.rejected}
    missing = [name for name, message in pair.items() if message is None]
    if (line.answers is None) == (len(missing) == 2):
        raise RecordError(f"{where}: must hold `chosen` and `rejected`, or `answers`")
    known = Preference(where, prompt, (), (), None, line.category, line.reference, line.criteria)
    if line.answers is None:
        if missing:
            raise RecordError(f"{where}: {missing[0]}: missing")
        answers = tuple(_message(message, where, name) for name, message in pair.items())
        if answers[0] == answers[1]:
            raise RecordError(f"{where}: chosen and rejected are the same")
        preference = replace(known, answers=answers, ratings=({}, {}), margin=line.margin)
    else:
        preference = _with_answers(known, line.answers)
    _require_turns(preference)
    return preference


def preference_to_json(preference: Preference) -> dict[str, Any]:
    """A line with ratings: plain data for JSON, without fields that say nothing."""
    plain = record_to_json(preference.joined())
    turns = len(preference.prompt.messages)
    answers = []
    for message, ratings in zip(plain["messages"][turns:], preference.ratings, strict=True):
        for one in ratings.values() or [Rating()]:
            named = {"rating": one.rating, "rater": one.rater, "by_criterion": one.by_criterion}
            answers.append({"message": message, **{key: value for key, value in named.items() if value}})
    more = {"category": preference.category, "reference": preference.reference, "criteria": preference.criteria}
    plain["messages"] = plain["messages"][:turns]
    return {**plain, **{key: value for key, value in more.items() if value}, "answers": answers}


def _together(first: Preference, later: Preference) -> Preference:
    prompts = [(one.prompt.messages, one.prompt.task, one.prompt.tools) for one in (first, later)]
    if prompts[0] != prompts[1]:
        raise RecordError(f"{later.where}: id: {later.prompt.id!r} has another prompt at {first.where}")
    return first.with_ratings_of(later)


def _with_answers(preference: Preference, answers: Sequence[_Answer]) -> Preference:
    if not answers:
        raise RecordError(f"{preference.where}: answers: must hold at least one")
    for number, answer in enumerate(answers):
        message = _message(answer.message, preference.where, f"answers.{number}.message")
        rated = answer.rating is not None or answer.by_criterion
        ratings = {answer.rater: Rating(answer.rating, answer.rater, answer.by_criterion)} if rated else {}
        twice = [r for one, r in zip(preference.answers, preference.ratings, strict=True) if one == message]
        if twice and answer.rater in twice[0].keys() & ratings.keys():
            by = f" by {answer.rater}" if answer.rater else ""
            raise RecordError(f"{preference.where}: answers.{number}: the same answer is rated twice{by}")
        one = replace(preference, answers=(message,), ratings=(ratings,))
        preference = preference.with_ratings_of(one)
    return preference


def _message(plain: Any, where: str, name: str) -> Message:
    """One turn of the assistant."""
    if not isinstance(plain, dict):
        kind = f"{len(plain)} turns" if isinstance(plain, list) else f"{plain!r:.60}"
        raise RecordError(f'{where}: {name}: must be one turn, {{"role": "assistant", "content": ...}}, got {kind}')
    try:
        (message,) = parse_record(json.dumps({"id": "-", "messages": [plain]}), where).messages
    except RecordError as error:
        raise RecordError(str(error).replace("messages.0", name)) from None
    if message.role != "assistant":
        raise RecordError(f"{where}: {name}.role: must be assistant, got {message.role!r}")
    return message


def _require_turns(preference: Preference) -> None:
    try:
        for index in range(len(preference.answers)):
            require_order(turns_of(preference.conversation(index), audio_history=True))
    except TurnError as error:
        raise RecordError(f"{preference.where}: {error}") from None
