"""`stepaudio evaluate control`: does generated speech do what its instruction tags asked for? See docs/control.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.evaluation.contours import FRAME_S
from stepaudio_train.evaluation.control_measures import Answers, compare, curves, languages_heard
from stepaudio_train.evaluation.control_report import control_page, control_table
from stepaudio_train.evaluation.spoken_answers import AnswerFile, SpokenAnswer, read_answers, tokens_duration_s
from stepaudio_train.evaluation.token_probe import PROBE_FRAME_S, LanguageClassifier, TokenProbe

_MAX_REFERENCE = 4000
"""Lines of the reference, spread over the file: about an hour of speech takes ten seconds to learn from."""
_HELD_OUT_EVERY = 10
"""Lines of the reference that the probe is checked on where there are no true recordings."""


@dataclass(frozen=True)
class ControlOptions:
    """What `stepaudio evaluate control` is asked for."""

    answers: Path
    """JSONL of what a model spoke."""
    output: Path
    """Folder for control.json and control.html."""
    reference: Path | None = None
    """JSONL of recordings with their tokens, to learn from how tokens sound."""
    truth: Path | None = None
    """JSONL of held-out recordings, measured beside the answers."""


@dataclass(frozen=True)
class ControlReport:
    """What was found."""

    found: dict[str, Any]
    """As in control.json."""
    output: Path

    def summary(self) -> str:
        """For people."""
        return f"{control_table(self.found)}{self.output / 'control.html'}\n"


def measure_control(options: ControlOptions) -> ControlReport:
    """Measure a model's answers; write control.json and control.html.

    Raises:
        UserError: a file is not there, or there is no spoken answer in it that can be used.
    """
    answers = _read(options.answers)
    truth = _read(options.truth) if options.truth else AnswerFile([], [])
    reference = _read(options.reference, PROBE_FRAME_S, _MAX_REFERENCE) if options.reference else AnswerFile([], [])
    spoken, beside = answers.answers, {"truth": truth.answers}
    found: dict[str, Any] = {"num_answers_from_tokens": sum(answer.sound is None for answer in spoken)}
    if found["num_answers_from_tokens"] and reference.answers:
        held_out = _read(options.truth, PROBE_FRAME_S).answers if options.truth else None
        probe, r2 = _checked_probe(reference.answers, held_out)
        found |= r2
        if probe is not None:
            spoken = [answer if answer.sound is not None else _through(probe, answer) for answer in spoken]
            beside["truth_from_tokens"] = [_through(probe, a) for a in truth.answers if a.tokens is not None]
    classifier = _language_classifier(reference.answers)
    if classifier is not None:
        found |= _checked_languages(classifier, spoken, truth.answers)
        spoken, *others = (list(_heard(classifier, some)) for some in (spoken, *beside.values()))
        beside = dict(zip(beside, others, strict=True))
    refused = [*answers.refused, *truth.refused, *reference.refused]
    found |= compare(spoken, **beside)
    found |= curves(spoken) | {f"{name}_truth": curve for name, curve in curves(truth.answers).items()}
    found |= {"languages_heard": languages_heard(spoken), "num_answers": len(spoken)}
    found |= {"num_refused": len(refused), "refused": [asdict(refusal) for refusal in refused]}
    write_atomically(options.output / "control.json", json.dumps(found, ensure_ascii=False, indent=1).encode())
    write_atomically(options.output / "control.html", control_page(found).encode())
    return ControlReport(found, options.output)


def _read(path: Path, frame_s: float = FRAME_S, at_most: int | None = None) -> AnswerFile:
    file = read_answers(path, frame_s, at_most)
    if not file.answers:
        why = f": {file.refused[0].name}: {file.refused[0].reason}" if file.refused else ""
        raise UserError(f"{path}: holds no spoken answer that can be used{why}; docs/control.md has the fields")
    return file


def _checked_probe(reference: Answers, held_out: Answers | None) -> tuple[TokenProbe | None, dict[str, float]]:
    """The probe, and what it explains of other recordings: a tenth of the reference, where none are given."""
    if held_out is None:
        held_out = reference[::_HELD_OUT_EVERY]
        reference = [answer for place, answer in enumerate(reference) if place % _HELD_OUT_EVERY]
    probe = TokenProbe.fit(reference)
    return probe, {f"probe_{name}_r2": r2 for name, r2 in probe.r2(held_out).items()} if probe else {}


def _through(probe: TokenProbe, answer: SpokenAnswer) -> SpokenAnswer:
    """The answer as its tokens alone tell it."""
    return replace(answer, sound=probe.contour(answer), duration_s=tokens_duration_s(answer.tokens))


def _language_classifier(reference: Answers) -> LanguageClassifier | None:
    known = [answer for answer in reference if answer.tokens is not None and answer.language is not None]
    return LanguageClassifier.fit([answer.tokens for answer in known], [answer.language for answer in known])


def _heard(classifier: LanguageClassifier, answers: Answers) -> Iterable[SpokenAnswer]:
    """The answers with the language that they are heard as, where there are tokens, and the language can be heard."""
    for answer in answers:
        known = answer.tokens is not None and (answer.asked_language or answer.language) in classifier.languages
        yield replace(answer, heard_language=classifier.classify(answer.tokens)) if known else answer


def _checked_languages(classifier: LanguageClassifier, spoken: Answers, truth: Answers) -> dict[str, Any]:
    right = [answer.heard_language == answer.language for answer in _heard(classifier, truth) if answer.heard_language]
    asked = {answer.asked_language for answer in spoken} - {None, *classifier.languages}
    return {
        "num_languages": len(classifier.languages),
        "languages_not_in_reference": sorted(asked),
        **({"language_classifier_accuracy_truth": sum(right) / len(right)} if right else {}),
    }
