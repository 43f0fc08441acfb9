"""Measures of what speech makes of its instruction tags: pure functions of spoken answers (docs/control.md).

A measure is a dict of flat names; what cannot be measured on the answers given is absent, not zero. Beside a measure
stands what a model deaf to its instructions would get: the same on answers that have exchanged them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from stepaudio_train.evaluation.contours import Contour
from stepaudio_train.evaluation.spoken_answers import SpokenAnswer

Numbers = dict[str, float]
Answers = Sequence[SpokenAnswer]
Points = Sequence[tuple[float, float]]
"""(asked for, produced)."""

SPEED = {"fast": 1, "slow": -1}
MOODS = ("happy", "angry", "sad")
FEATURES: dict[str, Callable[[Contour], float]] = {
    "f0": attrgetter("mean_pitch"),
    "f0_range": attrgetter("pitch_range"),
    "level": attrgetter("mean_level_db"),
}
_DRAWS = 100
"""Of exchanged instructions."""
_MIN_POINTS = 3


def compare(answers: Answers, **beside: Answers) -> Numbers:
    """All measures: NAME of the answers, and NAME_truth of those given as `truth`.

    Beside NAME stands its mean over draws in which answers exchange what they were asked for, NAME_permuted_tags
    (NAME_permuted_notes for the melody), and NAME_permuted_tags_spread: 95 % of the draws lie no farther from the mean.
    """
    numbers: Numbers = {}
    for measure in MEASURES:
        numbers |= measure.of(answers)
        numbers |= measure.of_deaf(answers)
        for suffix, others in beside.items():
            numbers |= {f"{name}_{suffix}": value for name, value in measure.of(others).items()}
    return numbers


def speed(answers: Answers) -> Numbers:
    """Whether faster asked for is shorter: rank correlation, and the share of pairs of one text in the right order.

    Edits are asked for a direction and not for a level, and are measured by that.
    """
    groups = relative_durations(answers, SPEED)
    spoken = [[timed for timed in group if timed.answer.task == "tts"] for group in groups]
    points = [(-timed.level, timed.duration) for group in spoken for timed in group]
    edits = [(-np.sign(t.level), t.duration) for group in groups for t in group if t.answer.task == "edit"]
    in_order = [
        (fast.duration < slow.duration) + (fast.duration == slow.duration) / 2
        for group in spoken
        for fast in group
        for slow in group
        if fast.level > slow.level
    ]
    return {
        **_found("speed_control_spearman", spearman(points), num_speed_answers=len(points)),
        **_found("speed_pairs_in_order", _mean(in_order), num_speed_pairs=len(in_order)),
        **_found("edit_speed_spearman", spearman(edits), num_edit_speed_answers=len(edits)),
    }


@dataclass(frozen=True)
class Timed:
    """An answer to a text that was asked for at several levels."""

    answer: SpokenAnswer
    level: int
    duration: float
    """By the mean over the levels of the text."""


def relative_durations(answers: Answers, signs: Mapping[str, int]) -> list[list[Timed]]:
    """By text and speaker; those asked for at one level alone are left out.

    Args:
        signs: as in `SpokenAnswer.level`.
    """
    texts: dict[Hashable, list[tuple[int, SpokenAnswer]]] = defaultdict(list)
    for answer in answers:
        if (level := answer.level(signs)) is not None:
            texts[_text(answer)].append((level, answer))
    groups = []
    for group in texts.values():
        means_s = means_by((level, answer.duration_s) for level, answer in group)
        if len(means_s) > 1:
            mean_s = float(np.mean(list(means_s.values())))
            groups.append([Timed(answer, level, answer.duration_s / mean_s) for level, answer in group])
    return groups


def moods(answers: Answers) -> Numbers:
    """For each mood, rank correlations of the level asked for with pitch, its range, loudness and duration."""
    spoken = [answer for answer in answers if answer.task == "tts"]
    numbers: Numbers = {}
    for mood in MOODS:
        for name, feature in FEATURES.items():
            numbers |= _found(f"{mood}_{name}_spearman", spearman(relative_to_neutral(spoken, mood, feature)))
        timed = [(t.level, t.duration) for group in relative_durations(spoken, {mood: 1}) for t in group]
        numbers |= _found(f"{mood}_duration_spearman", spearman(timed))
        if asked := sum(answer.asks_for(mood) for answer in spoken):
            numbers[f"num_{mood}_answers"] = asked
    return numbers


def relative_to_neutral(answers: Answers, mood: str, feature: Callable[[Contour], float]) -> list[tuple[float, float]]:
    """(level, feature over its mean in the speaker's answers without a tag), of speakers asked for the mood.

    A speaker without such answers is taken relative to the mean of all that are there.
    """
    speakers: dict[str | None, list[tuple[int, float]]] = defaultdict(list)
    for answer in answers:
        level = answer.level({mood: 1})
        if level is not None and answer.sound is not None and not np.isnan(value := feature(answer.sound)):
            speakers[answer.speaker].append((level, value))
    points: list[tuple[float, float]] = []
    for found in speakers.values():
        if any(level for level, _ in found):
            neutral = np.mean([value for level, value in found if not level] or [value for _, value in found])
            points += [(level, float(value - neutral)) for level, value in found]
    return points


def language(answers: Answers) -> Numbers:
    """The share of the answers in a language asked for that a classifier hears as that language."""
    right = [answer.heard_language == answer.asked_language for answer in answers if _language_is_heard(answer)]
    return _found("language_heard_share", _mean(right), num_language_answers=len(right))


def melody(answers: Answers) -> Numbers:
    """Correlations of the notes sung with the notes asked for, both over their means in the answer."""
    points: list[tuple[float, float]] = []
    singers = [answer for answer in answers if _melody_is_heard(answer)]
    for answer in singers:
        notes = np.stack([answer.notes, answer.sound.notes(len(answer.notes))], axis=1)
        notes = notes[~np.isnan(notes[:, 1])]
        if len(notes) > 1:
            points += map(tuple, notes - notes.mean(axis=0))
    return {
        **_found("melody_pearson", correlation(points), num_melody_answers=len(singers)),
        **_found("melody_spearman", spearman(points)),
    }


def rhythm(answers: Answers) -> Numbers:
    """How regular RAP is beside speech without a tag: the spread of the time between onsets, by its mean."""
    rap, untagged = (
        np.array([answer.sound.interval_variation for answer in answers if _rhythm_is_heard(answer) and chosen(answer)])
        for chosen in (lambda answer: answer.tags, lambda answer: not answer.tags)
    )
    if not len(rap) or not len(untagged):
        return {}
    more_regular = (rap[:, None] < untagged) + (rap[:, None] == untagged) / 2
    return {
        "rap_interval_variation": float(rap.mean()),
        "untagged_interval_variation": float(untagged.mean()),
        "rap_more_regular_share": float(more_regular.mean()),
        "num_rap_answers": len(rap),
        "num_untagged_answers": len(untagged),
    }


@dataclass(frozen=True)
class Measure:
    """A measure and its control."""

    of: Callable[[Answers], Numbers]
    exchanged: Callable[[Answers, Generator], Answers]
    """The answers it looks at, with what they were asked for exchanged among them."""
    suffix: str = "permuted_tags"

    def of_deaf(self, answers: Answers) -> Numbers:
        """Mean and spread over draws; {} where the measure is absent."""
        if not self.of(answers):
            return {}
        draws = [self.of(self.exchanged(answers, np.random.default_rng(seed))) for seed in range(_DRAWS)]
        numbers: Numbers = {}
        for name in sorted({name for draw in draws for name in draw if not name.startswith("num_")}):
            values = np.array([draw[name] for draw in draws if name in draw])
            spread = np.quantile(abs(values - values.mean()), 0.95)
            numbers |= {f"{name}_{self.suffix}": float(values.mean()), f"{name}_{self.suffix}_spread": float(spread)}
        return numbers


def exchange_tags(
    concerned: Callable[[SpokenAnswer], bool], among: Callable[[SpokenAnswer], Hashable]
) -> Callable[[Answers, Generator], Answers]:
    """What gives each answer concerned the tags of another one of its group, and leaves the others out."""

    def exchanged(answers: Answers, rng: Generator) -> Answers:
        groups: dict[Hashable, list[SpokenAnswer]] = defaultdict(list)
        for answer in filter(concerned, answers):
            groups[among(answer)].append(answer)
        return [
            replace(answer, tags=group[giver].tags)
            for group in groups.values()
            for answer, giver in zip(group, rng.permutation(len(group)), strict=True)
        ]

    return exchanged


def exchange_notes(answers: Answers, rng: Generator) -> Answers:
    """Every melody in another order."""
    return [replace(a, notes=tuple(rng.permutation(a.notes))) for a in answers if _melody_is_heard(a)]


def curves(answers: Answers) -> dict[str, dict[int, float]]:
    """For plots: mean relative duration by speed level, and mean pitch over neutral by mood level; absent if empty."""
    spoken = [answer for answer in answers if answer.task == "tts"]
    timed = (t for group in relative_durations(spoken, SPEED) for t in group)
    found = {"duration_by_speed_level": means_by((t.level, t.duration) for t in timed)}
    for mood in MOODS:
        points = relative_to_neutral(spoken, mood, FEATURES["f0"])
        found[f"f0_semitones_by_{mood}_level"] = means_by((int(level), value) for level, value in points)
    return {name: curve for name, curve in found.items() if curve}


def languages_heard(answers: Answers) -> dict[str, dict[str, int]]:
    """Language asked for -> language heard -> answers."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in filter(_language_is_heard, answers):
        counts[answer.asked_language][answer.heard_language] += 1
    return {asked: dict(sorted(heard.items())) for asked, heard in sorted(counts.items())}


def means_by(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Mean of the values of each key, by key."""
    values: dict[int, list[float]] = defaultdict(list)
    for key, value in pairs:
        values[key].append(value)
    return {key: float(np.mean(found)) for key, found in sorted(values.items())}


def spearman(points: Points) -> float | None:
    """Rank correlation; ties share the mean of their ranks. None and 0 as in `correlation`."""
    return correlation(np.stack([_ranks(side) for side in np.transpose(points)], axis=1) if len(points) else [])


def correlation(points: Points | NDArray[np.float64]) -> float | None:
    """Pearson's. None for fewer than 3 points or one thing asked for; 0 if all that is produced is the same."""
    if len(points) < _MIN_POINTS:
        return None
    asked, produced = np.transpose(points)
    if np.ptp(asked) == 0:
        return None
    return float(np.corrcoef(asked, produced)[0, 1]) if np.ptp(produced) > 1e-9 else 0.0


def _ranks(values: ArrayLike) -> NDArray[np.float64]:
    # Pitch is float32: what differs by its last digits is the same.
    _, places, counts = np.unique(np.round(values, 5), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _found(name: str, value: float | None, **counts: int) -> Numbers:
    return {} if value is None else {name: value, **counts}


def _text(answer: SpokenAnswer) -> Hashable:
    return answer.text, answer.speaker


def _language_is_heard(answer: SpokenAnswer) -> bool:
    return answer.heard_language is not None and answer.asked_language is not None


def _melody_is_heard(answer: SpokenAnswer) -> bool:
    return answer.asks_for("singing") and len(answer.notes) > 1 and answer.sound is not None


def _rhythm_is_heard(answer: SpokenAnswer) -> bool:
    if answer.tags and not answer.asks_for("RAP"):
        return False
    return answer.sound is not None and not np.isnan(answer.sound.interval_variation)


MEASURES = (
    Measure(speed, exchange_tags(lambda answer: answer.level(SPEED) is not None, _text)),
    Measure(
        moods,
        exchange_tags(
            lambda answer: not answer.tags or any(map(answer.asks_for, MOODS)), lambda answer: answer.speaker
        ),
    ),
    Measure(language, exchange_tags(_language_is_heard, lambda answer: None)),
    Measure(melody, exchange_notes, "permuted_notes"),
    Measure(rhythm, exchange_tags(_rhythm_is_heard, lambda answer: None)),
)
