"""`stepaudio tokenize`: recordings of any kind, or plain text -> shards of token samples.

A source with sub-folders of shards (train, validation, test, ...) becomes an output with the same sub-folders. Every
output shard is a job of its own: written whole, by whichever process takes it, and the same whoever does. A run that
was stopped goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.recording_jobs import RecordingJob, Refused, TarJob, is_dataset, recording_jobs
from stepaudio_train.data.records import text_record
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.shards import (
    SHARD_PATTERN,
    ShardSample,
    finish_dataset,
    list_shards,
    shard_counts,
    shard_name,
    write_shard,
)
from stepaudio_train.data.sources import AUDIO_SUFFIXES
from stepaudio_train.data.token_shards import STATS_FILE, TokenStats, encode_token_sample, file_sha256
from stepaudio_train.data.tokenize_workers import ShardTask, Workers, WorkerSettings
from stepaudio_train.data.verify_tokens import Agreement, verify_tokens
from stepaudio_train.tokenizers.precision import Precision
from stepaudio_train.tokenizers.speech import tokenizer_files
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
    """Recordings: an output of `stepaudio prepare` (or one split of it), a folder of audio, a manifest, WebDataset
    tars, a Hugging Face dataset (saved folder, Parquet, hf:NAME). Or a text corpus: a .txt file with a document a line,
    a .jsonl file with {"text": ...} a line, or a folder of such files."""
    output: Path
    text_tokenizer: Path
    """SentencePiece file. Text is stored as text; the stats count it in these ids."""
    speech_tokenizer: Path | None = None
    """Directory of a speech tokenizer, trained here or released. Not needed for text."""
    batch_audio_s: float = 120.0
    """Audio that is encoded at once."""
    max_text_tokens: int = 4096
    """Longer texts are divided at line or word boundaries: the loader cuts nothing."""
    device: str = "auto"
    precision: Precision = "fp32"
    num_workers: int = 1
    """Processes that encode. Each has its own tokenizer; on CUDA they take the devices in turn."""
    ray: str | None = None
    """Address of a ray cluster whose machines encode ("local": one on this machine); the folders must be shared."""
    verify_percent: float = 0.0
    """Share of the recordings that are encoded once more at the end, one by one in fp32, and compared."""


def tokenize(options: TokenizeOptions) -> dict[str, TokenStats]:
    """Write the datasets that `options` asks for; split name ("" if there are no splits) -> what is in it.

    Raises:
        UserError: nothing usable in the source, or an output folder that holds something else.
    """
    text_tokenizer = TextTokenizer.from_file(options.text_tokenizer)
    renderer = Renderer(Vocabulary(text_tokenizer.text_size), text_tokenizer)
    if not options.source.exists() and not is_dataset(options.source):
        raise UserError(f"{options.source}: no such file or folder")
    sha256 = file_sha256(options.text_tokenizer)
    texts = _text_files(options.source)
    if texts:
        _claim(options, texts)
        jobs = _text_jobs(texts, text_tokenizer, options.max_text_tokens)
        return {"": _write_texts(options.output, renderer, sha256, jobs, options.source.name)}
    if options.speech_tokenizer is None:
        raise UserError(f"{options.source}: holds recordings; give a speech tokenizer too")
    splits = _splits(options.source)
    _claim(options, _files_of(options.source, splits))
    settings = WorkerSettings(
        options.speech_tokenizer, options.text_tokenizer, options.batch_audio_s, options.device, options.precision
    )
    found = {}
    with Workers(settings, options.num_workers, options.ray) as workers:
        for name, split in splits.items():
            dataset = _Dataset(options.output / name, sha256)
            found[name] = dataset.encode(split, workers, name or options.source.name)
    return found


def verify(options: TokenizeOptions) -> dict[str, Agreement]:
    """Compare the output with `verify_percent` of the recordings encoded anew; writes `verify.json` into it.

    Raises:
        UserError: the source holds text, or the output is not finished.
    """
    if options.speech_tokenizer is None:
        raise UserError(f"{options.source}: only speech tokens can be verified; give a speech tokenizer")
    found = {
        name: verify_tokens(
            split.jobs, options.output / name, options.speech_tokenizer, options.device, options.verify_percent
        )
        for name, split in _splits(options.source).items()
    }
    content = {name or "all": agreement.summary() for name, agreement in found.items()}
    write_atomically(options.output / "verify.json", json.dumps(content, ensure_ascii=False, indent=1).encode())
    return found


@dataclass(frozen=True)
class Split:
    """What one output dataset is made of."""

    jobs: list[RecordingJob]
    refused: list[Refused]
    num_samples: int | None
    """For the progress bar, where it is known."""


@dataclass(frozen=True)
class _Dataset:
    """One output folder of speech tokens."""

    folder: Path
    text_tokenizer_sha256: str

    def encode(self, split: Split, workers: Workers, title: str) -> TokenStats:
        """Have every shard written that is not there, then write the index and the stats."""
        parts: dict[int, TokenStats] = {}
        tasks = []
        for number, job in enumerate(split.jobs):
            task = ShardTask(number, self.folder / shard_name(number), job)
            if task.stats_file.is_file():
                parts[number] = TokenStats.read(task.stats_file)
            else:
                tasks.append(task)
        with tqdm(total=split.num_samples, unit="sample", desc=f"tokenize {title}", dynamic_ncols=True) as bar:
            bar.update(sum(stats.num_samples + len(stats.refused) for stats in parts.values()))
            started_s, encoded_s = time.monotonic(), 0.0
            for number, stats in workers.run(tasks):
                parts[number] = stats
                encoded_s += stats.duration_s
                bar.update(stats.num_samples + len(stats.refused))
                bar.set_postfix_str(f"{encoded_s / (time.monotonic() - started_s):.0f} times real time")
        total = TokenStats(text_tokenizer_sha256=self.text_tokenizer_sha256)
        total.refused += [refused.reason for refused in split.refused]
        for number in sorted(parts):
            total.merge(parts[number])
        counts = {shard_name(number): stats.num_samples for number, stats in sorted(parts.items()) if stats.num_samples}
        return _finished(self.folder, counts, total, title)


def _finished(folder: Path, counts: dict[str, int], total: TokenStats, title: str) -> TokenStats:
    """Name what was left out, and make the folder a dataset."""
    if not total.num_samples:
        raise UserError(f"{title}: no sample could be used: {'; '.join(total.refused[:3]) or 'it is empty'}")
    for reason in total.refused[:_NAMED_REFUSALS]:
        log.warning("left out: %s", reason)
    if len(total.refused) > _NAMED_REFUSALS:
        log.warning("left out: %d in all; %s names them", len(total.refused), folder / STATS_FILE)
    finish_dataset(folder, counts)
    total.save(folder / STATS_FILE)
    return total


def _write_texts(
    folder: Path, renderer: Renderer, sha256: str, jobs: Iterator[Callable[[], TextJob]], title: str
) -> TokenStats:
    """Write a shard for each job, skipping those that are there."""
    total = TokenStats(text_tokenizer_sha256=sha256)
    counts = {}
    with tqdm(unit="sample", desc=f"tokenize {title}", dynamic_ncols=True) as bar:
        for number, job in enumerate(jobs):
            path = folder / shard_name(number)
            done = path.with_suffix(".stats.json")
            if done.is_file():
                stats = TokenStats.read(done)
            else:
                stats = TokenStats(text_tokenizer_sha256=sha256)
                write_shard(path, _counted(job(), stats, renderer))
                stats.save(done)
            bar.update(stats.num_samples + len(stats.refused))
            total.merge(stats)
            if stats.num_samples:
                counts[path.name] = stats.num_samples
    return _finished(folder, counts, total, title)


def _counted(job: TextJob, stats: TokenStats, renderer: Renderer) -> Iterator[ShardSample]:
    for sample in job:
        if isinstance(sample, Refused):
            stats.refused.append(sample.reason)
        else:
            stats.add(sample, renderer)
            yield encode_token_sample(sample)


TextJob = Iterator[TokenSample | Refused]
"""What one shard of text is made of."""


def _text_jobs(paths: list[Path], tokenizer: TextTokenizer, max_tokens: int) -> Iterator[Callable[[], TextJob]]:
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            numbered = enumerate(lines, 1)
            while block := list(islice(numbered, TEXTS_PER_SHARD)):
                yield lambda block=block, path=path: _texts(path, block, tokenizer, max_tokens)


def _texts(path: Path, lines: list[tuple[int, str]], tokenizer: TextTokenizer, max_tokens: int) -> TextJob:
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
    """The files of a text corpus; none if the source holds recordings."""
    if source.is_file():
        return [source] if source.suffix in TEXT_SUFFIXES and not _is_manifest(source) else []
    if is_dataset(source) or any(path.suffix.lower() in {*AUDIO_SUFFIXES, ".tar"} for path in source.rglob("*")):
        return []
    return sorted(p for p in source.iterdir() if p.suffix in TEXT_SUFFIXES)


def _is_manifest(path: Path) -> bool:
    """Whether a .jsonl file lists recordings: its first object names audio, or holds messages."""
    if path.suffix != ".jsonl":
        return False
    with path.open(encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint(("audio", "messages"))


def _splits(source: Path) -> dict[str, Split]:
    if source.is_dir() and not list(source.glob("*.tar")):
        folders = [p for p in sorted(source.iterdir()) if p.is_dir() and list(p.glob(SHARD_PATTERN))]
        if folders:
            return {folder.name: _split_of_shards(folder) for folder in folders}
    if source.is_dir() and list(source.glob(SHARD_PATTERN)):
        return {"": _split_of_shards(source)}
    jobs, refused = recording_jobs(source)
    return {"": Split(jobs, refused, None)}


def _split_of_shards(folder: Path) -> Split:
    return Split([TarJob(path) for path in list_shards(folder)], [], sum(shard_counts(folder).values()))


def _files_of(source: Path, splits: dict[str, Split]) -> list[Path]:
    """What the source's fingerprint is made of."""
    tars = [job.path for split in splits.values() for job in split.jobs if isinstance(job, TarJob)]
    if tars or not source.exists():
        return tars
    return [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())


def _claim(options: TokenizeOptions, files: list[Path]) -> None:
    """Make sure that the output folder is empty, or holds the beginning of exactly this work."""
    digest = hashlib.sha256(f"{options.max_text_tokens}|{file_sha256(options.text_tokenizer)}".encode())
    if not files:
        digest.update(str(options.source).encode())
    for file in files:
        digest.update(f"{file.relative_to(options.source) if file != options.source else file.name}".encode())
        digest.update(str(file.stat().st_size).encode())
    if options.speech_tokenizer is not None:
        digest.update(options.precision.encode())
        for file in tokenizer_files(options.speech_tokenizer):
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
