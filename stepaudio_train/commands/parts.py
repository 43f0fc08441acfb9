"""Several commands as one job: each is run once, its output goes to a file, and a stopped job goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from stepaudio_train.commands.processes import die_with_parent
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically

_TAIL_LINES = 15


class PartFailed(UserError):
    """A command left with an error. The message holds the end of its output."""


class Parts:
    """The parts of one job, in order, under `directory`: logs/<part>.log and parts/<part>.json when it is done.

    A part's fingerprint covers its command, what it says it depends on, and the fingerprints of all parts before it:
    results of other settings are refused, never mixed in.
    """

    def __init__(self, directory: Path, total: int) -> None:
        self.directory, self._total = directory, total
        self._fingerprint = ""
        self.seconds: dict[str, float] = {}
        """Part -> how long it took, in order."""

    def run(self, name: str, command: list[str], depends_on: Mapping[str, Any] | None = None) -> None:
        """Run `command` unless it has been run to its end.

        Raises:
            PartFailed: it left with an error; what it wrote is kept, and it is started again next time.
            UserError: it was run with other settings.
        """
        number = len(self.seconds) + 1
        head = f"[{number:>2}/{self._total}] {name.replace('_', ' '):<18}"
        settings = {"command": command, "depends_on": dict(depends_on or {}), "before": self._fingerprint}
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        marker = self.directory / "parts" / f"{name}.json"
        done = self._finished(marker, fingerprint, settings)
        if done is None:
            log = self.directory / "logs" / f"{name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            _say(f"{head} ... ", end="")
            started_s = time.monotonic()
            self._execute(command, log, name)
            done = time.monotonic() - started_s
            content = {"seconds": round(done, 2), "fingerprint": fingerprint, "settings": settings}
            write_atomically(marker, json.dumps(content, indent=1, default=str).encode())
            _say(f"{done:6.1f} s")
        else:
            _say(f"{head} done before, in {done:.1f} s")
        self.seconds[name] = done
        self._fingerprint = fingerprint

    def is_done(self, name: str) -> bool:
        """Whether a part has been run to its end, with whatever settings."""
        return (self.directory / "parts" / f"{name}.json").is_file()

    def _finished(self, marker: Path, fingerprint: str, settings: dict[str, Any]) -> float | None:
        if not marker.is_file():
            return None
        content = json.loads(marker.read_text(encoding="utf-8"))
        if content["fingerprint"] == fingerprint:
            return float(content["seconds"])
        changes = _difference(content["settings"], json.loads(json.dumps(settings, default=str)))
        raise UserError(
            f"{self.directory}: its part {marker.stem} was made with other settings ({changes}); type "
            f"run_dir=ANOTHER_FOLDER, or delete {self.directory} to start anew"
        )

    def _execute(self, command: list[str], log: Path, name: str) -> None:
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Signals of the terminal then reach it once, through `_forwarded`, and not twice.
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            with _forwarded(process) as received:
                code = process.wait()
        if received:
            _say("stopped; the same command goes on from here")
            raise SystemExit(128 + received[0])
        if code:
            _say("failed")
            with log.open(encoding="utf-8", errors="replace") as lines:
                tail = "".join(deque(lines, _TAIL_LINES))
            raise PartFailed(f"{name} left with exit status {code}; the end of {log}:\n{tail}")


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold `directory`, which is made if need be, for this process.

    Raises:
        UserError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{directory}: another process is at work in it; wait for it, or type another run_dir"
            ) from None
        yield


@contextlib.contextmanager
def _forwarded(process: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to `process`; yields the ones that came."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    changes = [
        f"{key} {before['depends_on'].get(key)} before, {value} now"
        for key, value in now["depends_on"].items()
        if before["depends_on"].get(key) != value
    ]
    removed = [word for word in before["command"] if word not in now["command"]]
    added = [word for word in now["command"] if word not in before["command"]]
    if removed or added:
        changes.append(f"{' '.join(removed) or 'nothing'} before, {' '.join(added) or 'nothing'} now")
    return "; ".join(changes) or "an earlier part differs"


def _say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()
