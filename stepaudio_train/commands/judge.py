"""`stepaudio data judge`: several answers to a prompt -> the same with a judge's ratings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.chat_endpoint import ChatEndpoint, ReplyCache
from stepaudio_train.data.chat_processing import in_order
from stepaudio_train.data.files import replacing, write_atomically
from stepaudio_train.data.importers.base import Recordings
from stepaudio_train.data.preference_files import Preference, PreferenceFile, Rating, preference_to_json
from stepaudio_train.data.sources import Refusal
from stepaudio_train.evaluation.preference_judges import (
    EndpointJudge,
    JudgementError,
    PreferenceJudge,
    RuleJudge,
    agreement,
)

_ENDPOINT = "endpoint:"
_NAMED_REFUSALS = 10


@dataclass(frozen=True)
class PreferenceJudgeOptions:
    """What `stepaudio data judge` is asked for."""

    source: Path
    """JSONL of prompts with answers (docs/preferences.md)."""
    output: Path
    """The JSONL file to write: the same with the judge's ratings alone."""
    judge: str
    """`rules`, or `endpoint:URL` of an OpenAI-compatible server, as endpoint:http://localhost:8000/v1."""
    min_words: int = 0
    max_words: int | None = None
    """Rules: an answer should have at least and at most as many; a Chinese character is a word. None: any number."""
    language: str | None = None
    """Rules: an answer should be in it, `en` or `zh`."""
    reference_weight: float = 1.0
    """Rules: of being the line's `reference` word for word."""
    length_weight: float = 1.0
    language_weight: float = 1.0
    compare: bool = False
    """Endpoint: compare each two answers, in both orders, instead of rating each."""
    endpoint_model: str | None = None
    endpoint_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Where there is none, no key is sent."""
    endpoint_workers: int = 8
    """Requests at a time."""


@dataclass(frozen=True)
class JudgeReport:
    """What was judged, and what was not."""

    source: str
    judge: str
    prompts: int
    answers: int
    mean_rating: float
    num_pairs: int
    """Pairs that the source gives or has ratings for."""
    agreement: float | None
    """Percent of these that the judge orders alike; where it does not tell, half."""
    refused: list[Refusal]

    def summary(self) -> str:
        """For people."""
        lines = [
            f"{self.source}: {self.answers} answers to {self.prompts} prompts rated {self.mean_rating:.2f} on average"
        ]
        if self.agreement is not None:
            lines.append(f"agrees with {self.agreement:.1f}% of {self.num_pairs} pairs that were there")
        lines += [f"left out: {refusal.name}: {refusal.reason}" for refusal in self.refused[:_NAMED_REFUSALS]]
        if len(self.refused) > _NAMED_REFUSALS:
            lines.append(f"and {len(self.refused) - _NAMED_REFUSALS} more, all of them in the report")
        return "\n".join(lines) + "\n"


def judge_preferences(options: PreferenceJudgeOptions) -> JudgeReport:
    """Write each prompt with the judge's ratings to `options.output`, and the report to `<output>.report.json`.

    What cannot be judged is left out by file, line and reason. An endpoint's replies are kept in
    `<output>.replies.jsonl` at once: the same command asks for none twice.

    Raises:
        UserError: options that do not go together, an endpoint that cannot be used, or nothing could be judged.
    """
    _check(options)
    judge, file = _judge(options), PreferenceFile.read(options.source)
    rater = "rules" if options.judge == "rules" else str(options.endpoint_model)
    judged, agreed, refused = [], [], list(file.refused)
    with replacing(options.output) as temporary:
        with temporary.open("w", encoding="utf-8") as lines:
            for preference, ratings in _rated(file.preferences, judge, options):
                if isinstance(ratings, str):
                    refused.append(Refusal(preference.where, ratings))
                    continue
                judged += ratings
                agreed.append(agreement(preference, ratings))
                line = preference_to_json(_with_ratings(preference, ratings, rater, options))
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        if not judged:
            reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3]) or "it is empty"
            raise UserError(f"{options.source}: nothing could be judged ({reasons})")
    pairs = [one for found in agreed for one in found]
    percent = 100 * sum(pairs) / len(pairs) if pairs else None
    mean = sum(judged) / len(judged)
    report = JudgeReport(str(options.source), rater, len(agreed), len(judged), mean, len(pairs), percent, refused)
    content = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    write_atomically(options.output.with_name(f"{options.output.name}.report.json"), content.encode())
    return report


def _rated(
    preferences: list[Preference], judge: PreferenceJudge, options: PreferenceJudgeOptions
) -> Iterator[tuple[Preference, list[float] | str]]:
    """Each prompt with its ratings, or with the reason why there are none."""

    def rate(preference: Preference) -> tuple[Preference, list[float] | str]:
        try:
            return preference, judge.rate(preference)
        except JudgementError as error:
            return preference, str(error)

    num_workers = 1 if options.judge == "rules" else options.endpoint_workers
    found = in_order(rate, preferences, num_workers)
    yield from tqdm(found, total=len(preferences), desc="judge", unit="prompt", dynamic_ncols=True)


def _with_ratings(
    preference: Preference, ratings: list[float], rater: str, options: PreferenceJudgeOptions
) -> Preference:
    folder, recordings = options.source.parent, Recordings(options.source.parent, options.output)
    preference = preference.with_recordings(lambda name: recordings.name(folder / name))
    return replace(preference, ratings=tuple({rater: Rating(rating, rater)} for rating in ratings), margin=None)


def _judge(options: PreferenceJudgeOptions) -> PreferenceJudge:
    if options.judge == "rules":
        weights = (options.reference_weight, options.length_weight, options.language_weight)
        return RuleJudge(options.min_words, options.max_words, options.language, *weights)
    cache = ReplyCache(options.output.with_name(f"{options.output.name}.replies.jsonl"))
    url = options.judge.removeprefix(_ENDPOINT)
    endpoint = ChatEndpoint.with_key_of(options.endpoint_key_env, url, str(options.endpoint_model), cache)
    return EndpointJudge(endpoint, options.compare)


def _check(options: PreferenceJudgeOptions) -> None:
    problems = []
    if not options.source.is_file():
        problems.append(f"{options.source}: no such file")
    if options.output.suffix != ".jsonl" or options.output.resolve() == options.source.resolve():
        problems.append(f"{options.output}: the output must be another file, and its name must end with .jsonl")
    if options.judge != "rules" and not options.judge.startswith((f"{_ENDPOINT}http://", f"{_ENDPOINT}https://")):
        problems.append(f"--judge {options.judge}: type --judge rules, or --judge endpoint:http://localhost:8000/v1")
    if options.judge.startswith(_ENDPOINT) and not options.endpoint_model:
        problems.append("--judge endpoint:... needs the model's name; type --endpoint-model NAME")
    if options.judge == "rules" and (options.compare or options.endpoint_model):
        problems.append("--compare and --endpoint-model go with --judge endpoint:URL")
    if options.endpoint_workers < 1:
        problems.append(f"--endpoint-workers {options.endpoint_workers}: must be at least 1")
    if options.max_words is not None and options.max_words < max(1, options.min_words):
        problems.append(f"--max-words {options.max_words}: must be at least 1, and no less than --min-words")
    if options.language not in (None, "en", "zh"):
        problems.append(f"--language {options.language}: en and zh can be told")
    for name in ("reference", "length", "language"):
        weight = getattr(options, f"{name}_weight")
        if not weight >= 0:
            problems.append(f"--{name}-weight {weight:g}: must be 0 or more")
    if problems:
        raise UserError("\n".join(problems))
