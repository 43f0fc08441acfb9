"""What every command of `stepaudio` is declared with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")

Command = Callable[[argparse.Namespace], int]


def command(
    commands: argparse._SubParsersAction, name: str, run: Command, summary: str, needs: str, example: str
) -> argparse.ArgumentParser:
    """A command, with the help that every one has."""
    parser = _parser(commands, name, summary, needs, example)
    parser.set_defaults(command=run, name=name, parser=parser)
    return parser


def group(
    commands: argparse._SubParsersAction, name: str, summary: str, needs: str, example: str
) -> argparse._SubParsersAction:
    """A command that has commands of its own."""
    parser = _parser(commands, name, summary, needs, example)
    return parser.add_subparsers(title="actions", metavar="ACTION", required=True)


def _parser(
    commands: argparse._SubParsersAction, name: str, summary: str, needs: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"needs: {needs}\nexample:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Defaults are the options' dataclass's; what is not typed is not there.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    return parser


def typed(options_type: type[T], options: argparse.Namespace) -> T:
    """The dataclass of a command's options out of what was typed."""
    names = {field.name for field in fields(options_type)}  # type: ignore[arg-type]
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name in names
    }
    return options_type(**given)
