"""`stepaudio run` without the process: starting one takes longer than a toy run."""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Sequence
from unittest import mock

from stepaudio_train.config.paths import recipes_dir


def run_here(recipe: str, overrides: Sequence[str]) -> None:
    """What `stepaudio run RECIPE OVERRIDES` does with one process, in this one, which keeps its handlers of signals.

    Raises:
        SystemExit: as the command ends where it fails: with 2 for a refused configuration, after telling on stderr.
    """
    program = str(recipes_dir() / f"{recipe}.py")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with mock.patch.object(sys, "argv", [program, *overrides]):
            runpy.run_path(program, run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
