"""This process's resident memory, as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path


def resident_bytes() -> int:
    """Now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Begin a new peak with what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError(f"/proc/self/status: has no {name}; this benchmark needs Linux")
    return int(found[1]) * 1024
