"""`stepaudio generate`: ask a trained model, from the files it was exported to."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from stepaudio_train.audio import read_audio
from stepaudio_train.commands.evaluate import fine_tuning_data
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.conversation_files import ConversationFile, Worker, encode_conversations
from stepaudio_train.data.records import AudioPart, Record, TextPart, read_records, speech_record, text_record
from stepaudio_train.data.render import TokenSample
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.evaluation.answers import answerable
from stepaudio_train.rollout.generate import generate
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import SpeechTextModel
from stepaudio_train.tokenizers.dual import audio_ids_to_text, merge_streams
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens
from stepaudio_train.tokenizers.vocabulary import Special

GenerationTask = Literal["asr", "tts", "continuation", "text", "chat"]
_SPEECH_TASKS = ("asr", "continuation")
_BATCH_RECORDINGS = 16


@dataclass(frozen=True)
class GenerateOptions:
    """What `stepaudio generate` is asked for."""

    model: Path
    """A run directory, or its export/ folder."""
    task: GenerationTask
    """asr: recordings to text. continuation: recordings go on, as audio tokens. tts: text to audio tokens. text: text
    goes on. chat: a fine-tuned model's answer to conversations, or to recordings and texts as a human's only turn."""
    audio: tuple[Path, ...] = ()
    text: tuple[str, ...] = ()
    records: Path | None = None
    """JSONL of records; paths of recordings are relative to it."""
    speech_tokenizer: Path | None = None
    """Directory of the tokenizer the model was trained with. Needed for recordings."""
    output: Path | None = None
    """JSONL file; None: standard output."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token, always."""
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    device: str = "auto"


def run_generation(options: GenerateOptions) -> int:
    """Write one JSON line a prompt: its id, the task, and `text`, or `audio_tokens` with their `duration_s`.

    Raises:
        UserError: no prompt, one that the task cannot take, or a model or tokenizer that cannot be used.
    """
    try:
        return _run_generation(options)
    except ValueError as error:  # of files and settings that do not fit each other
        raise UserError(str(error)) from error


def _run_generation(options: GenerateOptions) -> int:
    if options.task == "chat":
        return _chat(options)
    records = list(_prompts(options))
    if options.task in _SPEECH_TASKS and options.speech_tokenizer is None:
        raise UserError(f"{options.task} takes recordings; type --speech-tokenizer DIR, the one it was trained with")
    if not records:
        raise UserError("nothing to go on from; type --audio FILE, --text TEXT or --records FILE.jsonl")
    wanted = TextPart if options.task in ("tts", "text") else AudioPart
    for record in records:
        if not isinstance(_only_part(record), wanted):
            kind = "a text" if wanted is TextPart else "a recording"
            raise UserError(f"{record.id}: {options.task} takes {kind}")
    model = _model(options)
    _write(options, records, _generate(options, model, records))
    return 0


def _chat(options: GenerateOptions) -> int:
    """Answer conversations, rendered as the run's configuration says. What cannot be rendered is named; the rest goes
    on."""
    data = fine_tuning_data(options.model)
    if options.records is not None:
        file = ConversationFile.read(options.records, TagVocabulary(data.own_tags))
    else:
        file = ConversationFile(Path("prompts"), [(record.id, record) for record in _prompts(options)], [])
    tokenizer = options.speech_tokenizer or (None if data.speech_tokenizer is None else Path(data.speech_tokenizer))
    if tokenizer is None and file.recordings():
        raise UserError("there are recordings; type --speech-tokenizer DIR, the one the model was trained with")
    with TemporaryDirectory() as cache:
        (found,) = encode_conversations([file], tokenizer, Path(cache), Worker(device=options.device))
    model = _model(options)
    samples, refused = answerable(found, model.renderer, data.template, data.history)
    for refusal in refused:
        sys.stderr.write(f"left out: {refusal.name}: {refusal.reason}\n")
    if not samples:
        raise UserError("nothing to answer; type --records FILE.jsonl, --text TEXT or --audio FILE")
    seeds = range(options.seed, options.seed + len(samples))
    answers = model.answer(samples, _sampling(options), data.template, data.history, seeds)
    results = [
        {"text": answer.text, "ended": answer.ended, **({} if answer.speech is None else _spoken(answer.speech, model))}
        for answer in answers
    ]
    _write(options, [sample.record for sample in samples], results)
    return 1 if refused else 0


def _model(options: GenerateOptions) -> SpeechTextModel:
    export = options.model / "export"
    return SpeechTextModel.from_directory(export if export.is_dir() else options.model, options.device)


def _sampling(options: GenerateOptions) -> SamplingConfig:
    return SamplingConfig(options.max_new_tokens, options.temperature, options.top_k, options.top_p)


def _write(options: GenerateOptions, records: Sequence[Record], results: Sequence[dict[str, Any]]) -> None:
    with options.output.open("w", encoding="utf-8") if options.output else nullcontext(sys.stdout) as file:
        for record, result in zip(records, results, strict=True):
            file.write(json.dumps({"id": record.id, "task": options.task, **result}, ensure_ascii=False) + "\n")


def _prompts(options: GenerateOptions) -> Iterator[Record]:
    for path in options.audio:
        yield speech_record(path.stem, AudioPart(str(path)))
    for number, text in enumerate(options.text, 1):
        yield text_record(f"text {number}", text)
    if options.records is not None:
        for record in read_records(options.records):
            part = _only_part(record)
            if isinstance(part, AudioPart):
                part = replace(part, audio=str(options.records.parent / part.audio))
                yield speech_record(record.id, part)
            else:
                yield record


def _only_part(record: Record) -> AudioPart | TextPart:
    parts = [part for message in record.messages for part in message.content]
    if len(parts) != 1:
        raise UserError(f"{record.id}: has {len(parts)} parts; a pretrained model takes records of one")
    return parts[0]


def _generate(options: GenerateOptions, model: SpeechTextModel, records: Sequence[Record]) -> list[dict[str, Any]]:
    sampling = _sampling(options)
    seeds = range(options.seed, options.seed + len(records))
    if options.task == "tts":
        return [_spoken(s, model) for s in model.speak([_text(record) for record in records], sampling, seeds)]
    if options.task == "text":
        prompts = [model.renderer.render_prompt(TokenSample(record), "text").tolist() for record in records]
        found = generate(model.model, prompts, replace(sampling, stop_ids=(int(Special.EOS),)), seeds)
        size, tokenizer = model.renderer.vocabulary.text_size, model.renderer.text_tokenizer
        return [{"text": tokenizer.decode([i for i in one.ids if i < size])} for one in found]
    speech = _encoded(options, records)
    if options.task == "continuation":
        return [_spoken(s, model) for s in model.continue_speech(speech, sampling, seeds)]
    samples = [TokenSample(record, {_audio(record): tokens}) for record, tokens in zip(records, speech, strict=True)]
    return [{"text": text} for text in model.transcribe(samples, options.max_new_tokens)]


def _encoded(options: GenerateOptions, records: Sequence[Record]) -> list[SpeechTokens]:
    assert options.speech_tokenizer is not None
    tokenizer = SpeechTokenizer.from_directory(options.speech_tokenizer, options.device)
    encoded: list[SpeechTokens] = []
    for start in range(0, len(records), _BATCH_RECORDINGS):
        paths = [_audio(record) for record in records[start : start + _BATCH_RECORDINGS]]
        encoded += tokenizer.encode([read_audio(path, tokenizer.sample_rate_hz) for path in paths])
    return encoded


def _audio(record: Record) -> str:
    part = _only_part(record)
    assert isinstance(part, AudioPart)
    return part.audio


def _text(record: Record) -> str:
    return _only_part(record).text or ""


def _spoken(speech: SpeechTokens, model: SpeechTextModel) -> dict[str, Any]:
    ids = merge_streams(speech.linguistic, speech.semantic, model.renderer.vocabulary)
    text = audio_ids_to_text(ids, model.renderer.vocabulary)
    return {"audio_tokens": text, "duration_s": round(len(speech.semantic) / 25, 2)}
