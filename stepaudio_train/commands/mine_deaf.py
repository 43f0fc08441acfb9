"""`stepaudio data mine-deaf`: where a policy plays deaf, its answer becomes a rejected one (paper 5.2)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from stepaudio_train.audio.conditions import Condition
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.chat_endpoint import ChatEndpoint, ReplyCache
from stepaudio_train.data.chat_processing import in_order
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.importers.base import Recordings
from stepaudio_train.data.pair_lines import pair_to_json
from stepaudio_train.data.preference_files import Preference, PreferenceFile, parse_preference
from stepaudio_train.data.records import AudioPart, Message, RecordError, TextPart, describe_problem
from stepaudio_train.data.sources import Refusal
from stepaudio_train.evaluation.deafness import (
    ClassifierError,
    DeafnessClassifier,
    DeafRates,
    EndpointClassifier,
    PhraseClassifier,
    condition_of,
    deaf_rates,
)

_ENDPOINT = "endpoint:"
_GOOD_RATING = 4.0
"""Of an answer that may stand beside a deaf one as the chosen one: "good" of 1 to 5."""
_NAMED_REFUSALS = 10


@dataclass(frozen=True)
class MineDeafOptions:
    """What `stepaudio data mine-deaf` is asked for."""

    source: Path
    """JSONL of a policy's answers: `id` of the prompt, and `answer` or `text`, as `stepaudio evaluate answers` and
    `stepaudio generate` write them."""
    preferences: Path
    """JSONL of preferences (docs/preferences.md) that holds the prompts, `meta.condition` among them."""
    output: Path
    """The JSONL file of preferences to write."""
    detector: str = "phrases"
    """`phrases`, or `endpoint:URL` of an OpenAI-compatible server, as endpoint:http://localhost:8000/v1."""
    endpoint_model: str | None = None
    endpoint_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Where there is none, no key is sent."""
    endpoint_workers: int = 8
    """Requests at a time."""


@dataclass(frozen=True)
class MineDeafReport:
    """What was mined, and what was not."""

    source: str
    answers: int
    """Whose prompts are known and that could be read."""
    mined: int
    rates: DeafRates
    not_mined: dict[str, int]
    """Deaf answers, by why."""
    refused: list[Refusal]

    def summary(self) -> str:
        """For people."""
        lines = [f"{self.source}: {self.mined} preferences mined from {self.answers} answers", self.rates.summary()]
        lines += [f"not mined: {count} {why}" for why, count in self.not_mined.items()]
        lines += [f"left out: {refusal.name}: {refusal.reason}" for refusal in self.refused[:_NAMED_REFUSALS]]
        if len(self.refused) > _NAMED_REFUSALS:
            lines.append(f"and {len(self.refused) - _NAMED_REFUSALS} more, all of them in the report")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _AnswerLine:
    """Other fields are let pass."""

    id: str
    answer: str | None = None
    text: str | None = None
    audio_tokens: str | None = None


_LINE = TypeAdapter(_AnswerLine)


@dataclass(frozen=True)
class _Prompt:
    """A prompt and all that the preferences hold of it: each pair is a line of its own."""

    condition: Condition | None
    preferences: list[Preference]


@dataclass(frozen=True)
class _Answered:
    """A policy's answer and its prompt."""

    where: str
    prompt: _Prompt
    message: Message


@dataclass(frozen=True)
class _Told:
    """Whether an answer is deaf, and the answer that a deaf one to a clear prompt may stand beside."""

    deaf: bool
    chosen: Message | None = None


def mine_deaf(options: MineDeafOptions) -> MineDeafReport:
    """Write a preference of each deaf answer to a clear prompt, and the report to `<output>.report.json`.

    The reference or a good answer is chosen, the deaf one rejected. An output without lines is written too: a policy
    that never plays deaf is the aim.

    Raises:
        UserError: options that do not go together, an endpoint that cannot be used, or no answer belongs to a prompt.
    """
    _check(options)
    file = PreferenceFile.read(options.preferences)
    refused = list(file.refused)
    answered = list(_answered(options.source, _prompts(file, refused), refused))
    known = {(one.prompt.id, answer) for one in file.preferences for answer in one.answers}
    pairs, judged, not_mined = [], [], Counter[str]()
    for one, told in _told(answered, options):
        if isinstance(told, str):
            refused.append(Refusal(one.where, told))
            continue
        judged.append((one.prompt.condition, told.deaf))
        key = (one.prompt.preferences[0].prompt.id, one.message)
        if not told.deaf:
            continue
        if told.chosen is None or key in known:
            not_mined[_why_not(one.prompt.condition, key in known)] += 1
            continue
        known.add(key)
        try:
            pairs.append(_pair(one, told.chosen, options))
        except RecordError as error:
            refused.append(Refusal(one.where, str(error).removeprefix(f"{one.where}: ")))
    if not judged:
        reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3]) or "it is empty"
        raise UserError(f"{options.source}: no answer to a prompt of {options.preferences} can be used ({reasons})")
    rates = deaf_rates((condition, deaf) for condition, deaf in judged if condition is not None)
    report = MineDeafReport(str(options.source), len(judged), len(pairs), rates, dict(not_mined), refused)
    write_atomically(options.output, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in pairs).encode())
    content = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    write_atomically(options.output.with_name(f"{options.output.name}.report.json"), content.encode())
    return report


def _prompts(file: PreferenceFile, refused: list[Refusal]) -> dict[str, _Prompt]:
    """By id."""
    prompts: dict[str, _Prompt] = {}
    for preference in file.preferences:
        # As whole paths, so that the same recording has one name whichever file a line comes from.
        preference = preference.with_recordings(lambda name: os.path.abspath(file.path.parent / name))
        try:
            new = _Prompt(condition_of(preference.prompt.meta), [preference])
        except UserError as error:
            refused.append(Refusal(preference.where, str(error)))
            continue
        prompt = prompts.setdefault(preference.prompt.id, new)
        if prompt is new:
            continue
        first = prompt.preferences[0]
        if first.prompt.messages == preference.prompt.messages:
            prompt.preferences.append(preference)
        else:
            reason = f"id: {preference.prompt.id!r} has another prompt at {first.where}"
            refused.append(Refusal(preference.where, reason))
    return prompts


def _answered(path: Path, prompts: dict[str, _Prompt], refused: list[Refusal]) -> Iterator[_Answered]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                given = _LINE.validate_json(line)
            except ValidationError as error:
                reason = "; ".join(describe_problem(problem) for problem in error.errors())
                refused.append(Refusal(where, reason))
                continue
            said = given.text if given.answer is None else given.answer
            if given.id not in prompts:
                refused.append(Refusal(where, f"id: no prompt of the preferences is {given.id!r}"))
            elif said is None:
                refused.append(Refusal(where, "answer: missing; `text` may hold it as well"))
            elif given.audio_tokens and not said.strip():
                refused.append(Refusal(where, "answer: empty; of a spoken answer it must hold the words"))
            else:
                part = AudioPart(tokens=given.audio_tokens, text=said) if given.audio_tokens else TextPart(said)
                yield _Answered(where, prompts[given.id], Message("assistant", (part,)))


def _told(answered: list[_Answered], options: MineDeafOptions) -> Iterator[tuple[_Answered, _Told | str]]:
    """Each answer with what is told of it, or with the reason why nothing can be."""
    classifier = _classifier(options)

    def tell(one: _Answered) -> tuple[_Answered, _Told | str]:
        try:
            if not _is_deaf(one.message, classifier):
                return one, _Told(False)
            return one, _Told(True, _good_answer(one, classifier) if one.prompt.condition == "clear" else None)
        except ClassifierError as error:
            return one, str(error)

    num_workers = 1 if options.detector == "phrases" else options.endpoint_workers
    yield from tqdm(
        in_order(tell, answered, num_workers), total=len(answered), desc="mine", unit="answer", dynamic_ncols=True
    )


def _why_not(condition: Condition | None, known: bool) -> str:
    """Why a deaf answer is not mined."""
    if condition is None:
        return "deaf to prompts without meta.condition (clear, noisy, cut, silent)"
    if condition != "clear":
        return "deaf to recordings that are not clear, which is right"
    if known:
        return "mined already, or in the preferences"
    return "without a reference, or an answer chosen or rated 4 or more, to stand beside"


def _good_answer(one: _Answered, classifier: DeafnessClassifier) -> Message | None:
    """What is right, or was chosen or rated well, of the same kind, text or audio, and not deaf itself."""
    candidates: list[Message] = []
    for preference in one.prompt.preferences:
        if preference.reference:
            candidates.append(Message("assistant", (TextPart(preference.reference),)))
    for preference in one.prompt.preferences:
        if preference.margin is not None:
            candidates.append(preference.answers[0])
            continue
        rated = [(preference.mean_rating(index) or 0.0, answer) for index, answer in enumerate(preference.answers)]
        best = max(rated, key=lambda pair: pair[0])
        candidates += [best[1]] if best[0] >= _GOOD_RATING else []
    spoken = _is_spoken(one.message)
    alike = (message for message in candidates if _is_spoken(message) == spoken)
    return next((message for message in alike if not _is_deaf(message, classifier)), None)


def _pair(one: _Answered, chosen: Message, options: MineDeafOptions) -> dict[str, Any]:
    """Raises:
    RecordError: it is no preference that can be read.
    """
    first = one.prompt.preferences[0]
    names = Recordings(options.preferences.parent, options.output)
    pair = replace(first, answers=(chosen, one.message)).with_recordings(lambda name: names.name(Path(name)))
    category = first.category or one.prompt.condition
    line = pair_to_json(pair.prompt, pair.answers[0], pair.answers[1], category, first.reference)
    parse_preference(json.dumps(line), one.where, first.prompt.id)
    return line


def _is_deaf(message: Message, classifier: DeafnessClassifier) -> bool:
    parts = (part for part in message.content if isinstance(part, TextPart | AudioPart))
    said = "\n".join(part.text or "" for part in parts)
    return bool(said.strip()) and classifier.is_deaf(said)


def _is_spoken(message: Message) -> bool:
    return any(isinstance(part, AudioPart) for part in message.content)


def _classifier(options: MineDeafOptions) -> DeafnessClassifier:
    if options.detector == "phrases":
        return PhraseClassifier()
    cache = ReplyCache(options.output.with_name(f"{options.output.name}.replies.jsonl"))
    url = options.detector.removeprefix(_ENDPOINT)
    return EndpointClassifier(
        ChatEndpoint.with_key_of(options.endpoint_key_env, url, str(options.endpoint_model), cache)
    )


def _check(options: MineDeafOptions) -> None:
    problems = [f"{path}: no such file" for path in (options.source, options.preferences) if not path.is_file()]
    taken = (options.source.resolve(), options.preferences.resolve())
    if options.output.suffix != ".jsonl" or options.output.resolve() in taken:
        problems.append(f"{options.output}: the output must be another file, and its name must end with .jsonl")
    asks = options.detector.startswith((f"{_ENDPOINT}http://", f"{_ENDPOINT}https://"))
    if options.detector != "phrases" and not asks:
        problems.append(
            f"--detector {options.detector}: type --detector phrases, or --detector endpoint:http://localhost:8000/v1"
        )
    if asks and not options.endpoint_model:
        problems.append("--detector endpoint:... needs the model's name; type --endpoint-model NAME")
    if options.detector == "phrases" and options.endpoint_model:
        problems.append("--endpoint-model goes with --detector endpoint:URL")
    if options.endpoint_workers < 1:
        problems.append(f"--endpoint-workers {options.endpoint_workers}: must be at least 1")
    if problems:
        raise UserError("\n".join(problems))
