"""`stepaudio run`: start a recipe in one process, or in several on this machine.

Several machines are started by launch/torchrun.sh or launch/slurm/pretrain.sbatch. On one, this launcher does what a
person at a terminal expects: the first rank keeps the terminal and its progress bar, a stop signal reaches every rank
and waits for its checkpoint however long that takes, a failed rank is named with its last lines and its exit status,
and no rank outlives the launcher.
"""

from __future__ import annotations

import difflib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from stepaudio_train.commands.processes import die_with_parent
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.paths import recipes_dir

_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Steps on a CPU take and give back many megabytes; in large pages that costs up to a tenth less of their time (glibc
2.35 or newer; others do not look at it)."""
_TAIL_LINES = 40
_POLL_S = 0.1
_GRACE_S = 5.0
"""How long ranks may live on after one has failed. They wait for it in collectives and cannot save."""


def run_recipe_command(recipe: str, overrides: Sequence[str], num_processes: int) -> int:
    """Run recipes/<recipe>.py with Hydra overrides; the exit status of the command.

    With one process this call does not return: the recipe takes this process's place.

    Raises:
        UserError: there is no such recipe, or the number of processes is not positive.
    """
    program = find_recipe(recipe)
    if num_processes < 1:
        raise UserError(f"--nproc {num_processes}: must be at least 1")
    command = [sys.executable, str(program), *overrides]
    if num_processes == 1:
        sys.stdout.flush()
        os.execve(command[0], command, {**_HUGE_PAGES, **os.environ})
    return run_ranks(command, num_processes)


def run_ranks(command: list[str], num_processes: int) -> int:
    """Run `command` as every rank of one run; 0 if all left with 0, else the first failed one's exit status
    (128 + n if signal n ended it)."""
    return _Ranks(command, num_processes).wait()


def find_recipe(recipe: str) -> Path:
    """The program of a recipe.

    Raises:
        UserError: there is none of that name; the message lists the ones there are.
    """
    known = sorted(path.stem for path in recipes_dir().glob("*.py"))
    if recipe not in known:
        close = difflib.get_close_matches(recipe, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"recipes: {', '.join(known)}"
        raise UserError(f"no recipe {recipe!r}; {hint}")
    return recipes_dir() / f"{recipe}.py"


def rank_environments(num_processes: int, port: int) -> list[dict[str, str]]:
    """What torch.distributed reads, for every rank of one machine."""
    cores = len(os.sched_getaffinity(0))
    shared = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // num_processes)),
        # The machine's own name may not resolve (laptops, containers); the loopback always does.
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
        **_HUGE_PAGES,
    }
    return [
        {**defaults, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(num_processes)
    ]


class _Ranks:
    """The processes of one run on this machine."""

    def __init__(self, command: list[str], num_processes: int) -> None:
        self._signals = 0
        self._tails: dict[int, deque[str]] = {}
        self._readers: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        for rank, environment in enumerate(rank_environments(num_processes, _free_port())):
            self._processes.append(self._start(command, rank, environment))
        # Readers start behind the last fork: forking a process that has threads is not safe.
        for rank, process in enumerate(self._processes):
            if process.stdout is not None:
                self._follow(rank, process.stdout)

    def wait(self) -> int:
        try:
            while True:
                codes = [process.poll() for process in self._processes]
                failed = [rank for rank, code in enumerate(codes) if code]
                if failed:
                    self._end_others()
                    return self._report(failed[0], codes[failed[0]] or 1)
                if all(code == 0 for code in codes):
                    return 0
                time.sleep(_POLL_S)
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _start(self, command: list[str], rank: int, env: dict[str, str]) -> subprocess.Popen[str]:
        quiet = rank > 0
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
            text=True,
            errors="replace",
            # Ctrl-C then reaches the launcher alone, which tells each rank once.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def _follow(self, rank: int, stream: IO[str]) -> None:
        # Read all the time, or a rank that writes much would block on a full pipe.
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        reader = threading.Thread(target=tail.extend, args=(stream,), daemon=True)
        reader.start()
        self._tails[rank] = tail
        self._readers.append(reader)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """First signal: ranks save and leave. Second: they end at once."""
        self._signals += 1
        name = signal.Signals(number).name
        if self._signals == 1:
            _say(f"{name}: every rank saves a checkpoint and leaves; once more ends them at once")
            self._send(signal.SIGTERM)
        else:
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)  # does nothing for one that has ended

    def _end_others(self) -> None:
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(_POLL_S)
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        for reader in self._readers:
            reader.join(timeout=1.0)

    def _report(self, rank: int, code: int) -> int:
        status = 128 - code if code < 0 else code
        reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"
        # A refused configuration (status 2) has been told by rank 0, and a second stop signal was the user's own.
        if status == 2 or self._signals:
            return status
        for line in self._tails.get(rank, ()):
            _say(f"[rank {rank}] {line.rstrip()}")
        _say(f"rank {rank} {reason}; all ranks were ended. Each rank's log: RUN_DIR/logs/rank*.log")
        return status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(line: str) -> None:
    print(f"stepaudio: {line}", file=sys.stderr, flush=True)
