"""Sound files that commands write, and a table of them with which a killed command goes on."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import soundfile
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio import resample
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import replacing, write_atomically
from stepaudio_train.data.sources import Refusal

SoundFormat = Literal["wav", "flac"]
_KEY = "request"


def write_sound(path: Path, samples: Tensor, made_hz: int, sample_rate_hz: int | None = None) -> float:
    """Write [samples] float32 of `made_hz`; the file's duration in seconds.

    Args:
        path: its suffix says which format.
        sample_rate_hz: of the file; None: as it was made.
    """
    rate_hz = sample_rate_hz or made_hz
    samples = resample(samples, made_hz, rate_hz)
    with replacing(path) as temporary:
        soundfile.write(temporary, samples.numpy(), rate_hz, format=path.suffix[1:])
    return len(samples) / rate_hz


@dataclass(frozen=True)
class SoundTarget:
    """Where sounds go: FOLDER/ID.FORMAT, with a row each in FOLDER/TABLE.jsonl."""

    folder: Path
    table: str
    format: SoundFormat
    sample_rate_hz: int | None
    """Of the files; None: as they are made."""


@dataclass(frozen=True)
class SoundJob:
    """A sound to be made."""

    id: str
    """Names the file."""
    where: str
    """What errors call it."""
    key: str
    """Stands for all that decides about the sound (`request_key`)."""


@dataclass(frozen=True)
class MadeSound:
    """A sound, and what the table is to say of it besides `audio` (the file's name) and `duration_s`."""

    samples: Tensor
    """[N] float32."""
    sample_rate_hz: int
    row: Mapping[str, Any]
    warning: str | None = None


JobT = TypeVar("JobT", bound=SoundJob)


def request_key(*content: Any) -> str:
    """A short text that differs where the content, plain data and paths, does."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]


def write_sounds(
    target: SoundTarget,
    jobs: Sequence[JobT],
    refused: Sequence[Refusal],
    make: Callable[[Sequence[JobT]], Iterable[MadeSound | UserError]],
) -> int:
    """Make every sound that an earlier call of the same command has not made, and the table; the exit status.

    Args:
        refused: what is named at the beginning, and makes the status 1.
        make: gives, for each of the jobs in turn, its sound, or why there is none; called when there is any to make.

    Raises:
        UserError: the folder has what another command made.
    """
    table = SoundTable(target.folder, target.table, [job.key for job in jobs])
    waiting = [job for job in jobs if job.key not in table]
    failed = bool(refused)
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="file", dynamic_ncols=True) as bar:
        for refusal in refused:
            bar.write(f"left out: {refusal.name}: {refusal.reason}", sys.stderr)
        for job, made in zip(waiting, make(waiting) if waiting else (), strict=True):
            if isinstance(made, UserError):
                failed = True
                bar.write(f"left out: {job.where}: {made}", sys.stderr)
            else:
                name = f"{job.id}.{target.format}"
                duration_s = write_sound(target.folder / name, made.samples, made.sample_rate_hz, target.sample_rate_hz)
                table.add(job.key, {**made.row, "audio": name, "duration_s": round(duration_s, 3)})
                if made.warning:
                    bar.write(f"{job.where}: {made.warning}", sys.stderr)
            bar.update()
    table.finish()
    return int(failed)


class SoundTable:
    """A folder of sound files and NAME.jsonl, which has a row for each.

    A row is known by its request, a text that stands for all that decides about its sound. While the command runs, rows
    are added to NAME.jsonl.partial; `finish` puts them in order.
    """

    def __init__(self, folder: Path, name: str, requests: Iterable[str]) -> None:
        """Read what an earlier call of the same command has finished.

        Args:
            requests: all that this command is asked for, in order.

        Raises:
            UserError: the folder has what another command made.
        """
        self.folder = folder
        self._requests = dict.fromkeys(requests)
        self._file, self._partial = folder / f"{name}.jsonl", folder / f"{name}.jsonl.partial"
        self._rows: dict[str, dict[str, Any]] = {}
        for row in [*_rows(self._file), *_rows(self._partial)]:
            if row[_KEY] not in self._requests:
                raise UserError(
                    f"{folder}: holds {row['audio']}, which another command made; type another --output, or the same "
                    "command to go on"
                )
            if (folder / row["audio"]).is_file():
                self._rows[row[_KEY]] = row
        if self._partial.is_file():
            self.finish()

    def __contains__(self, request: str) -> bool:
        return request in self._rows

    def add(self, request: str, row: Mapping[str, Any]) -> None:
        """Note a sound file that has been written: `audio` is its name in the folder."""
        self._rows[request] = {**row, _KEY: request}
        with self._partial.open("a", encoding="utf-8") as file:
            file.write(_line(self._rows[request]))

    def finish(self) -> None:
        """Write NAME.jsonl."""
        rows = [self._rows[request] for request in self._requests if request in self._rows]
        write_atomically(self._file, "".join(map(_line, rows)).encode())
        self._partial.unlink(missing_ok=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a table; the last one may have been cut off when the command was killed.

    Raises:
        UserError: something else wrote it.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    try:
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if row[_KEY] and row["audio"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no table of sound files that this command wrote; type another --output") from error


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
