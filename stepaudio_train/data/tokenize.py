"""`stepaudio tokenize`: tars of recordings, or plain text -> shards of token samples.

A source with sub-folders of shards (train, validation, test, ...) becomes an output with the same sub-folders. Every
shard is written whole; a run that was stopped goes on with the first shard that is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio import AudioError, read_audio
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.records import Record, RecordError, parse_record, text_record, with_audio_parts
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.shards import (
    SHARD_PATTERN,
    ShardError,
    ShardSample,
    finish_dataset,
    list_shards,
    read_shard,
    shard_counts,
    shard_name,
    write_shard,
)
from stepaudio_train.data.token_shards import STATS_FILE, TokenStats, encode_token_sample, file_sha256
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary

log = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".jsonl")
TEXTS_PER_SHARD = 4096
_NAMED_REFUSALS = 10


@dataclass(frozen=True)
class TokenizeOptions:
    """What `stepaudio tokenize` is asked for."""

    source: Path
    """An output of `stepaudio prepare` (or one split of it); or a text corpus: a .txt file with a document a line, a
    .jsonl file with {"text": ...} a line, or a folder of such files."""
    output: Path
    text_tokenizer: Path
    """SentencePiece file. Text is stored as text; the stats count it in these ids."""
    speech_tokenizer: Path | None = None
    """Directory of a trained speech tokenizer. Not needed for text."""
    batch_audio_s: float = 120.0
    """Audio that is encoded at once, padding included."""
    max_text_tokens: int = 4096
    """Longer texts are divided at line or word boundaries: the loader cuts nothing."""
    device: str = "auto"


def tokenize(options: TokenizeOptions) -> dict[str, TokenStats]:
    """Write the datasets that `options` asks for; split name ("" if there are no splits) -> what is in it.

    Raises:
        UserError: nothing usable in the source, or an output folder that holds something else.
    """
    text_tokenizer = TextTokenizer.from_file(options.text_tokenizer)
    renderer = Renderer(Vocabulary(text_tokenizer.text_size), text_tokenizer)
    if not options.source.exists():
        raise UserError(f"{options.source}: no such file or folder")
    texts = _text_files(options.source)
    if texts:
        _claim(options, texts)
        stats = _Dataset(options.output, renderer, file_sha256(options.text_tokenizer)).write_all(
            _text_jobs(texts, text_tokenizer, options.max_text_tokens), options.source.name
        )
        return {"": stats}
    splits = _splits(options.source)
    if options.speech_tokenizer is None:
        raise UserError(f"{options.source}: holds recordings; give a speech tokenizer too")
    _claim(options, [shard for folder in splits.values() for shard in list_shards(folder)])
    speech = SpeechTokenizer.from_directory(options.speech_tokenizer, options.device)
    found = {}
    for name, folder in splits.items():
        dataset = _Dataset(options.output / name, renderer, file_sha256(options.text_tokenizer))
        encoder = _Encoder(speech, options.batch_audio_s)
        num_samples = sum(shard_counts(folder).values())
        found[name] = dataset.write_all(_speech_jobs(folder, encoder), name or options.source.name, num_samples)
    return found


@dataclass(frozen=True)
class Refused:
    """A sample of the source that is left out."""

    reason: str


Job = Iterator[TokenSample | Refused]
"""What one output shard is made of."""


@dataclass(frozen=True)
class _Dataset:
    """One output folder."""

    folder: Path
    renderer: Renderer
    text_tokenizer_sha256: str

    def write_all(self, jobs: Iterator[Callable[[], Job]], title: str, num_samples: int | None = None) -> TokenStats:
        """Write a shard for each job, skipping those that are there, then the index and the stats.

        Args:
            num_samples: of the source, where that is known; for the progress bar.
        """
        total = TokenStats(text_tokenizer_sha256=self.text_tokenizer_sha256)
        counts = {}
        with tqdm(total=num_samples, unit="sample", desc=f"tokenize {title}", dynamic_ncols=True) as bar:
            started_s = time.monotonic()
            encoded_s = 0.0
            for number, job in enumerate(jobs):
                path = self.folder / shard_name(number)
                done = path.with_suffix(".stats.json")
                if done.is_file():
                    stats = TokenStats.read(done)
                    bar.update(stats.num_samples + len(stats.refused))
                else:
                    stats = self._write(path, job(), bar)
                    stats.save(done)
                    encoded_s += stats.duration_s
                    if encoded_s:
                        bar.set_postfix_str(f"{encoded_s / (time.monotonic() - started_s):.0f} times real time")
                total.merge(stats)
                if stats.num_samples:
                    counts[path.name] = stats.num_samples
        if not total.num_samples:
            raise UserError(f"{title}: no sample could be used: {'; '.join(total.refused[:3]) or 'it is empty'}")
        for reason in total.refused[:_NAMED_REFUSALS]:
            log.warning("left out: %s", reason)
        if len(total.refused) > _NAMED_REFUSALS:
            log.warning("left out: %d in all; %s names them", len(total.refused), self.folder / STATS_FILE)
        finish_dataset(self.folder, counts)
        total.save(self.folder / STATS_FILE)
        return total

    def _write(self, path: Path, job: Job, bar: tqdm) -> TokenStats:
        stats = TokenStats(text_tokenizer_sha256=self.text_tokenizer_sha256)

        def samples() -> Iterator[ShardSample]:
            for sample in job:
                bar.update()
                if isinstance(sample, Refused):
                    stats.refused.append(sample.reason)
                else:
                    stats.add(sample, self.renderer)
                    yield encode_token_sample(sample)

        write_shard(path, samples())
        return stats


@dataclass(frozen=True)
class _Encoder:
    """Encodes the recordings of a shard in batches of similar length."""

    speech: SpeechTokenizer
    batch_audio_s: float

    def encode(self, shard: Path) -> Job:
        """Token samples of a shard of recordings, in its order."""
        samples, refused = self._read(shard)
        waveforms = [(i, p, w) for i, (_, parts) in enumerate(samples) for p, w in parts.items()]
        waveforms.sort(key=lambda item: len(item[2]))
        encoded: list[dict[str, SpeechTokens]] = [{} for _ in samples]
        for batch in self._batches(waveforms):
            with torch.inference_mode():
                tokens = self.speech.encode([waveform for _, _, waveform in batch])
            for (index, name, _), codes in zip(batch, tokens, strict=True):
                encoded[index][name] = codes
        for (record, _), speech in zip(samples, encoded, strict=True):
            yield TokenSample(record, speech)
        yield from refused

    def _read(self, shard: Path) -> tuple[list[tuple[Record, dict[str, Tensor]]], list[Refused]]:
        samples, refused = [], []
        try:
            for stored in read_shard(shard):
                where = f"{shard}: {stored.key}"
                try:
                    samples.append(self._decode(stored, where))
                except (RecordError, AudioError) as error:
                    refused.append(Refused(str(error)))
        except ShardError as error:
            refused.append(Refused(f"{error}; the {len(samples)} samples before that are used"))
        return samples, refused

    def _decode(self, stored: ShardSample, where: str) -> tuple[Record, dict[str, Tensor]]:
        if "json" not in stored.members:
            raise RecordError(f"{where}: has no record")
        record = parse_record(stored.members["json"], where)
        rate_hz = self.speech.sample_rate_hz
        waveforms = {}
        parts = []
        for part in record.audio_parts():
            if part.audio not in stored.members:
                raise RecordError(f"{where}: its record names {part.audio!r}, and there is no such member")
            name = part.audio.removesuffix("flac").rstrip(".") or "0"
            waveforms[name] = read_audio(io.BytesIO(stored.members[part.audio]), rate_hz, where)
            parts.append(replace(part, audio=name, duration_s=len(waveforms[name]) / rate_hz))
        if not parts:
            raise RecordError(f"{where}: its record holds no audio")
        return with_audio_parts(record, parts), waveforms

    def _batches(self, waveforms: list[tuple[int, str, Tensor]]) -> Iterator[list[tuple[int, str, Tensor]]]:
        """Runs of `waveforms`, shortest first, of at most `batch_audio_s` with padding, or of one."""
        limit = self.batch_audio_s * self.speech.sample_rate_hz
        batch: list[tuple[int, str, Tensor]] = []
        for item in waveforms:
            if batch and (len(batch) + 1) * len(item[2]) > limit:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch


def _speech_jobs(folder: Path, encoder: _Encoder) -> Iterator[Callable[[], Job]]:
    for shard in list_shards(folder):
        yield lambda shard=shard: encoder.encode(shard)


def _text_jobs(paths: list[Path], tokenizer: TextTokenizer, max_tokens: int) -> Iterator[Callable[[], Job]]:
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            numbered = enumerate(lines, 1)
            while block := list(islice(numbered, TEXTS_PER_SHARD)):
                yield lambda block=block, path=path: _texts(path, block, tokenizer, max_tokens)


def _texts(path: Path, lines: list[tuple[int, str]], tokenizer: TextTokenizer, max_tokens: int) -> Job:
    for number, line in lines:
        where = f"{path}:{number}"
        if not line.strip():
            continue
        text = line.strip()
        if path.suffix == ".jsonl":
            try:
                text = json.loads(line)["text"].strip()
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                yield Refused(f'{where}: is not of the form {{"text": "..."}}')
                continue
            if not text:
                yield Refused(f"{where}: its text is empty")
                continue
        parts = divide_text(text, tokenizer, max_tokens)
        for part, content in enumerate(parts):
            id = f"{path.name}:{number}" + (f":{part}" if len(parts) > 1 else "")
            yield TokenSample(text_record(id, content))


def divide_text(text: str, tokenizer: TextTokenizer, max_tokens: int) -> list[str]:
    """Pieces of at most `max_tokens` ids, about equally long, divided at a line end or else a space where possible."""
    if len(text) < 2 or len(tokenizer.encode(text)) <= max_tokens:
        return [text]
    middle = len(text) // 2
    at = middle
    for mark in ("\n", " "):
        places = [p for p in (text.rfind(mark, 1, middle), text.find(mark, middle, -1)) if p > 0]
        near = [p for p in places if abs(p - middle) < len(text) // 4]
        if near:
            at = min(near, key=lambda p: abs(p - middle))
            break
    halves = (text[:at].strip(), text[at:].strip())
    return [piece for half in halves if half for piece in divide_text(half, tokenizer, max_tokens)]


def _text_files(source: Path) -> list[Path]:
    if source.is_file():
        if source.suffix not in TEXT_SUFFIXES:
            raise UserError(f"{source}: a text corpus is a {' or '.join(TEXT_SUFFIXES)} file")
        return [source]
    if list(source.rglob(SHARD_PATTERN)):
        return []
    return sorted(p for p in source.iterdir() if p.suffix in TEXT_SUFFIXES)


def _splits(source: Path) -> dict[str, Path]:
    if list(source.glob(SHARD_PATTERN)):
        return {"": source}
    splits = {p.name: p for p in sorted(source.iterdir()) if p.is_dir() and list(p.glob(SHARD_PATTERN))}
    if not splits:
        raise UserError(
            f"{source}: neither shards nor .txt or .jsonl files in it; `stepaudio prepare` makes shards of recordings"
        )
    return splits


def _claim(options: TokenizeOptions, files: list[Path]) -> None:
    """Make sure that the output folder is empty, or holds the beginning of exactly this work."""
    digest = hashlib.sha256(f"{options.max_text_tokens}|{file_sha256(options.text_tokenizer)}".encode())
    for file in files:
        digest.update(f"{file.relative_to(options.source) if file != options.source else file.name}".encode())
        digest.update(str(file.stat().st_size).encode())
    if options.speech_tokenizer is not None:
        for file in sorted(options.speech_tokenizer.glob("*.safetensors")):
            digest.update(file_sha256(file).encode())
    marker = options.output / "tokenize.json"
    content = {"fingerprint": digest.hexdigest()}
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8")) != content:
            raise UserError(
                f"{options.output}: was made from other data or with other tokenizers; choose another output folder, "
                "or delete this one"
            )
    elif options.output.is_dir() and any(options.output.iterdir()):
        raise UserError(f"{options.output}: is not empty, and was not written by `stepaudio tokenize`; choose another")
    write_atomically(marker, json.dumps(content).encode())
