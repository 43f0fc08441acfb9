"""What people rate and have rated: prompts with answers, and a file to which every rating is added at once.

Each rating is a line of preferences (`data/preference_files.py`) with one answer: the last line counts of each rater.
So the file can be learned from at any time, and a rating that is changed is one more line.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import soundfile

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.chat import tool_call_text
from stepaudio_train.data.importers.base import Recordings
from stepaudio_train.data.preference_files import (
    HIGHEST_RATING,
    LOWEST_RATING,
    Preference,
    PreferenceFile,
    Rating,
    preference_to_json,
)
from stepaudio_train.data.records import AudioPart, Message, ToolCall
from stepaudio_train.data.sources import Refusal

log = logging.getLogger(__name__)

MAX_NAME = 60
"""Characters of a rater's name."""


class SheetError(ValueError):
    """Something that is not on the sheet, or no rating. The message says what."""


class RatingSheet:
    """The prompts of a file, numbered from 0. Several threads may use it at once."""

    def __init__(self, source: Path, output: Path, criteria: Sequence[str]) -> None:
        """Read what there is to rate, and what `output` holds already.

        Args:
            criteria: what is rated where a line does not say it itself.

        Raises:
            UserError: nothing in `source` can be rated, or `output` holds ratings of other prompts.
        """
        file = PreferenceFile.read(source)
        self.refused: list[Refusal] = list(file.refused)
        self._output, self._skips, self._lock = (
            output,
            output.with_name(f"{output.name}.skipped.jsonl"),
            threading.Lock(),
        )
        self._prompts: list[Preference] = []
        self._recordings: list[list[Path]] = []
        recordings = Recordings(source.parent, output)
        for preference in file.preferences:
            paths = [source.parent / part.audio for part in preference.joined().audio_parts()]
            problem = _problem(preference, paths)
            if problem is not None:
                self.refused.append(Refusal(preference.where, problem))
                continue
            named = preference.with_recordings(lambda name: recordings.name(source.parent / name))
            self._prompts.append(replace(named, ratings=tuple({} for _ in named.answers), margin=None))
            self._recordings.append(paths)
        if not self._prompts:
            reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in self.refused[:3]) or "it is empty"
            raise UserError(f"{source}: nothing can be rated ({reasons})")
        self._criteria = [prompt.criteria or tuple(criteria) for prompt in self._prompts]
        self._numbers = {prompt.prompt.id: number for number, prompt in enumerate(self._prompts)}
        self._skipped = set(_read_skips(self._skips))
        if output.is_file():
            self._take(PreferenceFile.read(output))

    def __len__(self) -> int:
        return len(self._prompts)

    def next_number(self, rater: str) -> int | None:
        """The first prompt that the rater has neither rated nor skipped; None: there is none."""
        return next((number for number in range(len(self)) if not self._done(number, rater)), None)

    def prompt(self, number: int, rater: str) -> dict[str, Any]:
        """A prompt with its answers in this rater's order, and what they have rated: plain data for JSON."""
        preference, shown = self._at(number), 0
        messages = []
        for message in (*preference.prompt.messages, *preference.answers):
            messages.append({"role": message.role, "parts": list(_parts(message, number, shown))})
            shown += sum(isinstance(part, AudioPart) for part in message.content)
        turns = len(preference.prompt.messages)
        order = list(range(len(preference.answers)))
        # Drawn by rater, so that over raters no place is favoured; the same when they come back.
        random.Random(f"{rater}|{preference.prompt.id}").shuffle(order)
        answers = []
        for index in order:
            given = preference.ratings[index].get(rater, Rating()).by_criterion
            answers.append({"index": index, "parts": messages[turns + index]["parts"], "given": given})
        done = sum(self._done(other, rater) for other in range(len(self)))
        return {
            "number": number,
            "total": len(self),
            "done": done,
            "id": preference.prompt.id,
            "criteria": self._criteria[number],
            "messages": messages[:turns],
            "answers": answers,
        }

    def recording(self, number: int, index: int) -> Path:
        """A recording of a prompt or of its answers, counted through in their order.

        Raises:
            SheetError: there is none.
        """
        self._at(number)
        if not 0 <= index < len(self._recordings[number]):
            raise SheetError(f"prompt {number} has no recording {index}")
        return self._recordings[number][index]

    def rate(self, number: int, rater: str, answer: int, criterion: str, rating: int) -> None:
        """Keep a rating, in memory and on disk.

        Raises:
            SheetError: no such answer, criterion or rating.
        """
        preference, criteria = self._at(number), self._criteria[number]
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(preference.answers):
            raise SheetError(f"prompt {number} has no answer {answer!r}")
        if criterion not in criteria:
            raise SheetError(f"{criterion!r} is not rated here, but {', '.join(criteria)}")
        if isinstance(rating, bool) or rating not in range(LOWEST_RATING, HIGHEST_RATING + 1):
            raise SheetError(f"a rating is {LOWEST_RATING} to {HIGHEST_RATING}, got {rating!r}")
        with self._lock:
            given = self._prompts[number].ratings[answer]
            by_criterion = {**given.get(rater, Rating()).by_criterion, criterion: float(rating)}
            whole = set(criteria) == by_criterion.keys()
            mean = sum(by_criterion.values()) / len(by_criterion) if whole else None
            one = Rating(mean, rater, by_criterion)
            line = replace(preference, answers=(preference.answers[answer],), ratings=({rater: one},))
            _append(self._output, preference_to_json(line))
            given[rater] = one

    def skip(self, number: int, rater: str) -> None:
        """Keep that a rater does not want to rate a prompt.

        Raises:
            SheetError: there is no such prompt.
        """
        id = self._at(number).prompt.id
        with self._lock:
            if (rater, id) not in self._skipped:
                _append(self._skips, {"rater": rater, "id": id})
                self._skipped.add((rater, id))

    def _at(self, number: int) -> Preference:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self):
            raise SheetError(f"there is no prompt {number!r}; there are {len(self)}")
        return self._prompts[number]

    def _done(self, number: int, rater: str) -> bool:
        preference = self._prompts[number]
        rated = all(ratings.get(rater, Rating()).rating is not None for ratings in preference.ratings)
        return rated or (rater, preference.prompt.id) in self._skipped

    def _take(self, earlier: PreferenceFile) -> None:
        """Ratings of an earlier sitting. Those of prompts and answers that are no longer there are left alone."""
        for refusal in earlier.refused:
            log.warning("%s: passed over: %s", refusal.name, refusal.reason)
        for preference in earlier.preferences:
            number = self._numbers.get(preference.prompt.id)
            if number is None:
                continue
            own = self._prompts[number]
            if preference.prompt.messages != own.prompt.messages:
                raise UserError(f"{preference.where}: is of another prompt than {own.where}; type another --output")
            for answer, ratings in zip(preference.answers, preference.ratings, strict=True):
                if answer in own.answers:
                    own.ratings[own.answers.index(answer)].update(ratings)


def _problem(preference: Preference, paths: Sequence[Path]) -> str | None:
    """Why people cannot rate it; None: they can."""
    if len(preference.answers) < 2:
        return "has one answer; a preference needs two or more"
    for part, path in zip(preference.joined().audio_parts(), paths, strict=True):
        if not part.audio:
            return "a recording is given by its codes alone; name a file to listen to in `audio`"
        try:
            soundfile.info(path)
        except (OSError, soundfile.SoundFileError) as error:
            return f"{path}: cannot be read as audio: {error}"
    return None


def _parts(message: Message, number: int, first: int) -> Iterator[dict[str, str]]:
    """What a page shows. The recordings are those from `first` on."""
    for part in message.content:
        if isinstance(part, AudioPart):
            yield {"audio": f"/audio/{number}/{first}", "text": part.text or ""}
            first += 1
        else:
            yield {"text": tool_call_text(part).strip() if isinstance(part, ToolCall) else part.text}


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        # The line's end comes first too, so that it also ends what a killed run left.
        lines.write("\n" + json.dumps(line, ensure_ascii=False) + "\n")


def _read_skips(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line or "{}")
            yield entry["rater"], entry["id"]
        except (ValueError, TypeError, KeyError):
            if line:  # that a killed run left half written
                log.warning("%s: passed over a broken line", path)
