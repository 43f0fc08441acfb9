"""A run that is killed while it learns and started again by the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_TIMEOUT_S = 240.0


def kill_and_run_again(command: Sequence[str], run_dir: Path, after_steps: int) -> str:
    """Start `command`, end all its processes by SIGKILL once the run has logged `after_steps`, and run it to its end.

    Returns:
        What the second one wrote to stderr.

    Raises:
        AssertionError: the first one ended before it could be killed, or the second one failed.
    """
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, metrics = time.monotonic() + _TIMEOUT_S, run_dir / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < after_steps:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # A launcher's ranks are sessions of their own, and go down with it a little later.
    time.sleep(0.5)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr
