"""`stepaudio data process`: conversations made fit to train a chat model on (paper 5.2.1).

Each step takes a record and gives it back, changed or not, or the reason why it is refused. At the end recognition of
some of the recordings is added.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal, TextIO, TypeVar

import soundfile
from tqdm import tqdm

from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.sft import ChatHistory
from stepaudio_train.data.chat import (
    SPEECH_TASKS,
    TurnError,
    history_as_text,
    is_dialogue,
    require_order,
    task_of,
    turns_of,
)
from stepaudio_train.data.chat_endpoint import ChatEndpoint, ReplyCache
from stepaudio_train.data.endpoint_rewriter import EndpointRewriter
from stepaudio_train.data.files import replacing, write_atomically
from stepaudio_train.data.importers.base import Recordings
from stepaudio_train.data.prompts import recognition_record
from stepaudio_train.data.records import (
    AudioPart,
    Message,
    Part,
    Record,
    RecordError,
    TextPart,
    parse_record,
    record_to_json,
    with_audio_parts,
)
from stepaudio_train.data.rewriting import RewriteError, Rewriter, RuleRewriter
from stepaudio_train.data.sources import Refusal
from stepaudio_train.tokenizers.dual import GROUP_SAMPLES, TOKENS_PER_GROUP
from stepaudio_train.tokenizers.learning.recognition import words_of

SpokenStyle = Literal["rules", "endpoint"]
Step = Callable[[Record], Record | str]
"""A record -> the record as it goes on, or why it does not."""

_NAMED_REFUSALS = 10
_WAITING_PER_WORKER = 4

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class ProcessOptions:
    """What `stepaudio data process` is asked for. The steps are in the order in which they are done."""

    source: Path
    """JSONL of conversations (docs/fine_tuning.md)."""
    output: Path
    """The JSONL file to write."""
    max_input_words: int | None = None
    """Refuse conversations whose human turns have more words, transcripts included. A Chinese character is a word."""
    max_input_s: float | None = None
    """Refuse conversations whose human turns have more seconds of recordings."""
    max_answer_words: int | None = None
    """Refuse conversations whose last answer has more words, before it is rewritten."""
    spoken_style: SpokenStyle | None = None
    """Rewrite written answers as they would be spoken, by rules or by a model behind an endpoint. None leaves them."""
    max_answer_sentences: int | None = None
    """Keep the first sentences of each rewritten answer."""
    language: str | None = None
    """Of the answers, such as `en` or `zh`. None tells English, Chinese and other scripts apart by the characters."""
    endpoint: str | None = None
    """Of an OpenAI-compatible server, as `http://localhost:8000/v1`."""
    endpoint_model: str | None = None
    endpoint_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Where there is none, no key is sent."""
    endpoint_workers: int = 8
    """Requests at a time."""
    asr_copies: float = 0.0
    """Share, 0 to 1, of the conversations about a transcribed recording to which recognition of it is added."""
    history: ChatHistory = "audio"
    """text: replace recordings before the last question by their transcripts."""
    seed: int = 0
    """Of the choice of asr_copies."""


@dataclass(frozen=True)
class StepCount:
    """What a step did."""

    changed: int
    """Of the records that were written."""
    refused: int


@dataclass(frozen=True)
class ProcessReport:
    """What was written, and what was not."""

    source: str
    records_in: int
    records_out: int
    """ASR copies included."""
    asr_copies: int
    steps: dict[str, StepCount]
    """In their order. `read` refuses what is no conversation."""
    refused: list[Refusal]

    def summary(self) -> str:
        """For people."""
        lines = [f"{self.source}: {self.records_in} in, {self.records_out} out, {self.asr_copies} of them ASR copies"]
        lines += [f"{name:<14}{done.changed:>9} changed{done.refused:>9} refused" for name, done in self.steps.items()]
        lines += [f"  {refusal.name}: {refusal.reason}" for refusal in self.refused[:_NAMED_REFUSALS]]
        if len(self.refused) > _NAMED_REFUSALS:
            lines.append(f"  and {len(self.refused) - _NAMED_REFUSALS} more, all of them in the report")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Outcome:
    """What became of a line: records, or a refusal by the step it names."""

    records: tuple[Record, ...] = ()
    changed_by: tuple[str, ...] = ()
    refused_by: str | None = None
    refusal: Refusal | None = None


def process(options: ProcessOptions) -> ProcessReport:
    """Write what the steps leave of a file to `options.output`, and the report beside it, `<output>.report.json`.

    A line that is no conversation, or that a step refuses, is left out by file, line and reason.

    Raises:
        UserError: options that do not go together, an endpoint that cannot be used, or no record is left.
    """
    _check(options)
    steps = _steps(options)
    num_workers = options.endpoint_workers if options.spoken_style == "endpoint" else 1
    outcomes = in_order(lambda line: _processed(line, steps, options), _lines(options.source), num_workers)
    with replacing(options.output) as temporary:
        with temporary.open("w", encoding="utf-8") as lines:
            report = _written(tqdm(outcomes, desc="process", unit="record", dynamic_ncols=True), lines, steps, options)
        if not report.records_out:
            reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in report.refused[:3]) or "it is empty"
            raise UserError(f"{options.source}: nothing of it is left ({reasons})")
    content = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    write_atomically(options.output.with_name(f"{options.output.name}.report.json"), content.encode())
    return report


def within_limits(record: Record, folder: Path, options: ProcessOptions) -> Record | str:
    """The record, if its questions and its last answer are short enough.

    Args:
        folder: where relative paths of recordings begin.
    """
    questions = [message for message in record.messages if message.role == "human"]
    answers = [message for message in record.messages if message.role == "assistant"]
    limits = (
        ("questions", questions, "--max-input-words", options.max_input_words),
        ("last answer", answers[-1:], "--max-answer-words", options.max_answer_words),
    )
    for name, messages, option, limit in limits:
        num_words = sum(len(words_of(said_in(message))) for message in messages)
        if limit is not None and num_words > limit:
            return f"{num_words} words in its {name}; {option} is {limit}"
    if options.max_input_s is not None:
        try:
            recordings = [part for m in questions for part in m.content if isinstance(part, AudioPart)]
            input_s = sum(_duration_s(part, folder) for part in recordings)
        except (OSError, soundfile.SoundFileError) as error:
            return f"a recording cannot be read: {error}"
        if input_s > options.max_input_s:
            return f"{input_s:.1f} s of recordings in its questions; --max-input-s is {options.max_input_s:g}"
    return record


def with_spoken_answers(record: Record, rewriter: Rewriter, language: str | None) -> Record | str:
    """The record with every written answer as it would be spoken.

    Answers with recordings stay as they are, and so do transcripts, also the one that TAQTA's answer begins with.
    """
    if task_of(record) in SPEECH_TASKS:
        return record
    question, messages = Message("human", ()), []
    for number, message in enumerate(record.messages, 1):
        if message.role == "human":
            question = message
        elif message.role == "assistant" and not any(isinstance(part, AudioPart) for part in message.content):
            heard = "\n".join(_transcripts(question)) if record.task == "taqta" else ""
            content: list[Part] = []
            try:
                # Texts that stand together are one text, as they are when they are rendered.
                for written, parts in groupby(message.content, lambda part: isinstance(part, TextPart)):
                    if written:
                        text = "".join(part.text for part in parts if isinstance(part, TextPart))
                        content.append(TextPart(_spoken(text, heard, said_in(question), rewriter, language)))
                    else:
                        content += parts
            except RewriteError as error:
                return f"turn {number}: {error}"
            message = replace(message, content=tuple(content))
        messages.append(message)
    return replace(record, messages=tuple(messages))


def with_text_history(record: Record) -> Record | str:
    """The record with the recordings before the last question of a dialogue replaced by their transcripts."""
    if not is_dialogue(record):
        return record
    try:
        return replace(record, messages=history_as_text(record.messages))
    except TurnError as error:
        return str(error).replace("data.history=audio", "--history audio")


def recognition_copy(record: Record, share: float, seed: int) -> Record | None:
    """For a share of the records, recognition of the one transcribed recording that their last question holds.

    Which records these are follows from their ids and the seed alone.
    """
    digest = hashlib.sha256(f"{seed} {record.id}".encode()).digest()
    if int.from_bytes(digest[:8], "big") >= share * 2**64 or task_of(record) == "asr":
        return None
    questions = [message for message in record.messages if message.role == "human"]
    recordings = [part for message in questions[-1:] for part in message.content if isinstance(part, AudioPart)]
    if len(recordings) != 1 or not recordings[0].text:
        return None
    return recognition_record(f"{record.id}#asr", recordings[0], recordings[0].text)


def said_in(message: Message) -> str:
    """What is written in a turn, and the transcripts of its recordings."""
    return " ".join(part.text for part in message.content if isinstance(part, TextPart | AudioPart) and part.text)


def _transcripts(message: Message) -> list[str]:
    return [part.text for part in message.content if isinstance(part, AudioPart) and part.text]


def _spoken(text: str, heard: str, question: str, rewriter: Rewriter, language: str | None) -> str:
    answer = text.removeprefix(heard)
    if not answer.strip():
        return text
    spoken = rewriter.rewrite(question, answer, language)
    if not spoken:
        raise RewriteError("nothing of the answer can be spoken")
    return f"{heard}\n{spoken}" if heard and text.startswith(heard) else spoken


def _duration_s(part: AudioPart, folder: Path) -> float:
    if part.duration_s is not None:
        return part.duration_s
    if part.tokens is not None:
        return part.tokens.count("<audio_") // TOKENS_PER_GROUP * GROUP_SAMPLES / SAMPLE_RATE_HZ
    return soundfile.info(folder / part.audio).duration


def _check(options: ProcessOptions) -> None:
    problems = []
    if not options.source.is_file():
        problems.append(f"{options.source}: no such file")
    if options.output.suffix != ".jsonl" or options.output.resolve() == options.source.resolve():
        problems.append(f"{options.output}: the output must be another file, and its name must end with .jsonl")
    for name in ("max_input_words", "max_input_s", "max_answer_words"):
        limit = getattr(options, name)
        if limit is not None and not limit > 0:
            problems.append(f"--{name.replace('_', '-')} {limit:g}: must be over 0")
    if not 0 <= options.asr_copies <= 1:
        problems.append(f"--asr-copies {options.asr_copies:g}: must be a share between 0 and 1")
    if options.endpoint_workers < 1:
        problems.append(f"--endpoint-workers {options.endpoint_workers}: must be at least 1")
    if options.max_answer_sentences is not None and options.max_answer_sentences < 1:
        problems.append(f"--max-answer-sentences {options.max_answer_sentences}: must be at least 1")
    if options.max_answer_sentences is not None and options.spoken_style is None:
        problems.append("--max-answer-sentences cuts rewritten answers; type --spoken-style rules too")
    if options.spoken_style == "endpoint":
        if not (options.endpoint or "").startswith(("http://", "https://")):
            problems.append(f"--endpoint {options.endpoint}: type a URL, such as --endpoint http://localhost:8000/v1")
        if not options.endpoint_model:
            problems.append("--spoken-style endpoint needs the model's name; type --endpoint-model NAME")
    elif options.endpoint or options.endpoint_model:
        problems.append("--endpoint and --endpoint-model go with --spoken-style endpoint; type that too")
    if problems:
        raise UserError("\n".join(problems))


def _steps(options: ProcessOptions) -> dict[str, Step]:
    """Those that are asked for, in their order."""
    steps: dict[str, Step] = {}
    if any(limit is not None for limit in (options.max_input_words, options.max_input_s, options.max_answer_words)):
        steps["length"] = lambda record: within_limits(record, options.output.parent, options)
    if options.spoken_style is not None:
        rewriter = _rewriter(options)
        steps["spoken_style"] = lambda record: with_spoken_answers(record, rewriter, options.language)
    if options.history == "text":
        steps["history"] = with_text_history
    return steps


def _rewriter(options: ProcessOptions) -> Rewriter:
    rules = RuleRewriter(options.max_answer_sentences)
    if options.spoken_style == "rules":
        return rules
    cache = ReplyCache(options.output.with_name(f"{options.output.name}.rewrites.jsonl"))
    model = (options.endpoint or "", options.endpoint_model or "")
    return EndpointRewriter(ChatEndpoint.with_key_of(options.endpoint_key_env, *model, cache), rules)


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of the lines that are not blank."""
    with source.open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def in_order(work: Callable[[_T], _R], items: Iterable[_T], num_workers: int) -> Iterator[_R]:
    """What `work` makes of each item in threads, in the items' order; only a few are read ahead."""
    pool = ThreadPoolExecutor(num_workers)
    waiting: deque[Future[_R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) == num_workers * _WAITING_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _processed(numbered: tuple[int, bytes], steps: Mapping[str, Step], options: ProcessOptions) -> _Outcome:
    number, line = numbered
    where = f"{options.source}:{number}"
    try:
        record = _read(line, where, number, options)
    except (RecordError, TurnError) as error:
        return _Outcome(refused_by="read", refusal=Refusal(where, str(error).removeprefix(f"{where}: ")))
    changed_by = []
    for name, step in steps.items():
        result = step(record)
        if isinstance(result, str):
            return _Outcome(refused_by=name, refusal=Refusal(where, result))
        if result != record:
            changed_by.append(name)
        record = result
    copy = recognition_copy(record, options.asr_copies, options.seed)
    return _Outcome((record,) if copy is None else (record, copy), tuple(changed_by))


def _read(line: bytes, where: str, number: int, options: ProcessOptions) -> Record:
    """A conversation, with its recordings named as the output has them."""
    source, recordings = options.source, Recordings(options.source.parent, options.output)
    record = parse_record(line, where, default_id=f"{source.name}:{number}")
    require_order(turns_of(record, audio_history=True))
    return with_audio_parts(
        record,
        [
            replace(part, audio=recordings.name(source.parent / part.audio)) if part.audio else part
            for part in record.audio_parts()
        ],
    )


def _written(
    outcomes: Iterable[_Outcome], lines: TextIO, steps: Mapping[str, Step], options: ProcessOptions
) -> ProcessReport:
    """Write the records, and count."""
    changed: Counter[str] = Counter()
    refused_by: Counter[str] = Counter()
    refused: list[Refusal] = []
    kept = copies = 0
    for outcome in outcomes:
        if outcome.refusal is not None:
            refused.append(outcome.refusal)
            refused_by[outcome.refused_by or ""] += 1
            continue
        changed.update(outcome.changed_by)
        kept, copies = kept + 1, copies + len(outcome.records) - 1
        lines.writelines(json.dumps(record_to_json(one), ensure_ascii=False) + "\n" for one in outcome.records)
    counts = {name: StepCount(changed[name], refused_by[name]) for name in ("read", *steps)}
    return ProcessReport(str(options.source), kept + len(refused), kept + copies, copies, counts, refused)
