"""The `stepaudio` command. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stepaudio_train.cli import bench, data, models, speech
from stepaudio_train.cli.parsing import Command
from stepaudio_train.config.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. 2: what was asked for cannot be done, and the message says what can."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positionals behind options; Hydra overrides may stand anywhere.
    if rest and not (hasattr(options, "overrides") and not any(word.startswith("-") for word in rest)):
        options.parser.error(f"unknown: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    command: Command = options.command
    try:
        return command(options)
    except (UserError, OSError) as error:
        print(f"stepaudio {options.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="stepaudio",
        description="Train unified speech-text language models: recordings in, a pretrained model out.",
        epilog="`stepaudio COMMAND --help` says what a command needs and gives an example.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        models.add_run,
        data.add_prepare,
        data.add_tokenize,
        data.add_data,
        models.add_generate,
        models.add_evaluate,
        speech.add_synthesize,
        speech.add_decode,
        speech.add_resynthesize,
        models.add_convert,
        models.add_export,
        models.add_plan,
        bench.add_bench,
        models.add_doctor,
    ):
        add(commands)
    return parser
