"""What every program here prints (as `stepaudio bench` does), and the options that they share."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepaudio_train.commands.bench.reporting import report

__all__ = ["parser", "report"]


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the results there too")
    return made
