"""Who encodes: this process, several on this machine, or the machines of a ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType

import torch

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.recording_jobs import Recording, RecordingJob, Refused
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.shards import ShardSample, write_shard
from stepaudio_train.data.token_shards import TokenStats, encode_token_sample, file_sha256
from stepaudio_train.tokenizers.dual import num_groups
from stepaudio_train.tokenizers.precision import Precision
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker needs to know."""

    speech_tokenizer: Path
    text_tokenizer: Path
    batch_audio_s: float
    device: str
    precision: Precision


@dataclass(frozen=True)
class ShardTask:
    """One output shard."""

    number: int
    path: Path
    job: RecordingJob

    @property
    def stats_file(self) -> Path:
        """Written last: a shard with its stats is whole."""
        return self.path.with_suffix(".stats.json")


class Workers:
    """Runs tasks, in any order. Use it in a `with` block."""

    def __init__(self, settings: WorkerSettings, num_workers: int, ray_address: str | None) -> None:
        """
        Args:
            num_workers: processes on this machine; 1 is this process itself. No effect with ray.

        Raises:
            UserError: `num_workers` is not positive, or ray is not installed.
        """
        if num_workers < 1:
            raise UserError(f"--num-workers {num_workers}: must be at least 1")
        self._settings = settings
        self._pool: ProcessPoolExecutor | None = None
        self._ray = None if ray_address is None else _Ray(settings, ray_address)
        if self._ray is None and num_workers > 1:
            context = multiprocessing.get_context("spawn")
            numbers = context.Queue()
            for number in range(num_workers):
                numbers.put(number)
            self._pool = ProcessPoolExecutor(
                num_workers, context, _start_worker, (numbers, num_workers, len(os.sched_getaffinity(0)))
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            # Ctrl-C reaches the workers too; a shard that they leave half-way is a temporary file.
            self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[tuple[int, TokenStats]]:
        """Write the shards; number and stats of each as it is done.

        Raises:
            UserError: a worker process died.
        """
        if self._ray is not None:
            yield from self._ray.run(tasks)
        elif self._pool is None:
            for task in tasks:
                yield task.number, encode_shard(task, self._settings)
        else:
            waiting = {self._pool.submit(encode_shard, task, self._settings): task for task in tasks}
            yield from _finished(waiting)


def _finished(waiting: Mapping[Future[TokenStats], ShardTask]) -> Iterator[tuple[int, TokenStats]]:
    for future in as_completed(waiting):
        try:
            yield waiting[future].number, future.result()
        except BrokenProcessPool:
            raise UserError(
                f"a worker process died before {waiting[future].path.name} was written, as when memory runs out; what "
                "is written is kept, and the same command goes on, with fewer --num-workers if need be"
            ) from None


class _Ray:
    """The same tasks on a cluster, a task for each shard."""

    def __init__(self, settings: WorkerSettings, address: str) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise UserError("--ray: needs a package; type: pip install 'stepaudio-train[ray]'") from None
        self._module = ray
        ray.init(address=None if address == "local" else address, log_to_driver=False)
        gpus = 1 if settings.device == "cuda" else 0
        self._encode: Callable[..., object] = partial(
            ray.remote(num_cpus=1, num_gpus=gpus)(encode_shard).remote, settings=settings
        )

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[tuple[int, TokenStats]]:
        waiting = {self._encode(task): task for task in tasks}
        while waiting:
            (done,), _ = self._module.wait(list(waiting))
            yield waiting.pop(done).number, self._module.get(done)


def encode_shard(task: ShardTask, settings: WorkerSettings) -> TokenStats:
    """Write one shard and its stats."""
    encoder, renderer = _tools(settings)
    stats = TokenStats(text_tokenizer_sha256=file_sha256(settings.text_tokenizer))

    def samples() -> Iterator[ShardSample]:
        for sample in _encoded(task.job, encoder, settings.batch_audio_s):
            if isinstance(sample, Refused):
                stats.refused.append(sample.reason)
            else:
                stats.add(sample, renderer)
                yield encode_token_sample(sample)

    write_shard(task.path, samples())
    stats.save(task.stats_file)
    return stats


@lru_cache(maxsize=1)
def _tools(settings: WorkerSettings) -> tuple[SpeechTokenizer, Renderer]:
    """Read once a process."""
    text = TextTokenizer.from_file(settings.text_tokenizer)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{_WORKER['number'] % torch.cuda.device_count()}"
    speech = SpeechTokenizer.from_directory(settings.speech_tokenizer, device, settings.precision)
    return speech, Renderer(Vocabulary(text.text_size), text)


_WORKER = {"number": 0}
"""Which of the processes this is."""


def _start_worker(numbers: multiprocessing.Queue[int], num_workers: int, cores: int) -> None:
    _WORKER["number"] = numbers.get()
    torch.set_num_threads(max(1, cores // num_workers))


def _encoded(job: RecordingJob, encoder: SpeechTokenizer, batch_audio_s: float) -> Iterator[TokenSample | Refused]:
    """Token samples of a job, in its order; a few batches of recordings are in memory at a time."""
    waiting = job.recordings(encoder.sample_rate_hz)
    while block := list(_at_most(waiting, batch_audio_s * encoder.sample_rate_hz)):
        recordings = [item for item in block if isinstance(item, Recording)]
        names = [(index, name) for index, recording in enumerate(recordings) for name in recording.waveforms]
        codes = encoder.encode([recordings[index].waveforms[name] for index, name in names])
        speech: list[dict[str, SpeechTokens]] = [{} for _ in recordings]
        for (index, name), tokens in zip(names, codes, strict=True):
            speech[index][name] = tokens
        following = iter(zip(recordings, speech, strict=True))
        for item in block:
            yield item if isinstance(item, Refused) else _usable(*next(following))


def _at_most(items: Iterator[Recording | Refused], num_samples: float) -> Iterator[Recording | Refused]:
    """The next items, until they hold `num_samples` in all."""
    taken = 0
    for item in items:
        yield item
        if isinstance(item, Recording):
            taken += sum(len(waveform) for waveform in item.waveforms.values())
        if taken >= num_samples:
            return


def _usable(recording: Recording, speech: dict[str, SpeechTokens]) -> TokenSample | Refused:
    for name, tokens in speech.items():
        if not num_groups(len(tokens.linguistic), len(tokens.semantic)):
            return Refused(f"{recording.record.id}: its audio {name!r} is too short for a token group of 0.12 s")
    return TokenSample(recording.record, speech)
