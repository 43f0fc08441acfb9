"""Ends a run between two steps."""

from __future__ import annotations

import signal
from types import FrameType


class StopOnSignal:
    """Remembers a SIGTERM (from a scheduler) or SIGINT, so that the step in hand can end and be saved."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
