"""What child processes have in common."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however that happens; without it, the ranks or parts of a killed
    job would work on and hold the run directory. For `preexec_fn` or a pool's initializer. No effect but on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
