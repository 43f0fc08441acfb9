"""From YAML files and command-line overrides to one frozen, checked configuration object.

Hydra composes, pydantic checks types and unknown keys (recursively, all at once), and afterwards nothing touches
OmegaConf again.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.paths import configs_dir
from stepaudio_train.config.shorthand import NamedByFile

T = TypeVar("T")


def load_config(
    name: str,
    config_type: type[T],
    overrides: Sequence[str] = (),
    check: Callable[[T], list[str]] | None = None,
) -> T:
    """Compose `configs/<name>.yaml` with `overrides` into a `config_type`.

    Args:
        name: a file in configs/. Its defaults list starts with `<name>_defaults`, which holds the dataclass's defaults.
        overrides: Hydra's grammar: `group=option`, `key.sub=value`. A leading `+` changes nothing: unknown keys are
            refused with it as without it. `part=FILE` is `part.path=FILE` for a part that is `NamedByFile`.
        check: rules over several fields; returns one line for each that is broken.

    Raises:
        ConfigError: with every problem found, not only the first.
    """
    composed = _compose(name, config_type, overrides)
    config = from_mapping(config_type, composed)
    problems = check(config) if check else []
    if problems:
        raise ConfigError(problems)
    return config


def from_mapping(config_type: type[T], mapping: dict[str, Any]) -> T:
    """Build `config_type` from plain data, as saved by `save_config`.

    Raises:
        ConfigError: naming every unknown key and every value of a wrong type.
    """
    try:
        return TypeAdapter(config_type).validate_python(mapping)
    except ValidationError as error:
        raise ConfigError([_describe(config_type, problem) for problem in error.errors()]) from None


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain data of a configuration, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def save_config(config: Any, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_config(config_type: type[T], path: Path) -> T:
    """Read what `save_config` wrote."""
    return from_mapping(config_type, yaml.safe_load(path.read_text(encoding="utf-8")))


def quoted(text: str) -> str:
    """`text` as a value in Hydra's grammar, for overrides that a program writes."""
    if re.fullmatch(r"[\w./-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def run_recipe(
    main: Callable[[T], None],
    config_type: type[T],
    name: str,
    check: Callable[[T], list[str]] | None = None,
) -> None:
    """Start a recipe: compose its configuration from the command line and call `main`.

    An error that the user can mend is told without a traceback, by the rank that met it (a refused configuration by
    rank 0 alone), and ends the program: exit status 2 for the configuration, 1 for the rest.
    """
    try:
        main(load_config(name, config_type, sys.argv[1:], check))
    except UserError as error:
        rank, refused = os.environ.get("RANK", "0"), isinstance(error, ConfigError)
        if rank == "0" or not refused:
            sys.stderr.write(f"{error}\n" if rank == "0" else f"rank {rank}: {error}\n")
        raise SystemExit(2 if refused else 1) from None


def _compose(name: str, config_type: type, overrides: Sequence[str]) -> dict[str, Any]:
    ConfigStore.instance().store(f"{name}_defaults", dataclasses.asdict(config_type()))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configs_dir()), version_base=None):
            composed = compose(name, [_normalised(override, config_type) for override in overrides])
            return typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_readable(error)]) from None


def _normalised(override: str, config_type: type) -> str:
    """Let Hydra set any key, known or not: what is unknown is found afterwards, all at once, with a suggestion."""
    key, equals, value = override.partition("=")
    bare = key.lstrip("+")
    if not equals:
        if override.startswith("~"):
            return override
        raise ConfigError([f"{override!r}: an override has the form key=value"])
    part = typing.get_type_hints(config_type).get(bare)
    if isinstance(part, type) and issubclass(part, NamedByFile):
        return f"++{bare}.path={value}"
    is_group = (configs_dir() / bare.split("@")[0]).is_dir()
    return f"{bare}={value}" if is_group else f"++{bare}={value}"


def _readable(error: Exception) -> str:
    # Hydra's first lines hold the fact; the rest is its own search path.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("Config search path", "provider=", "Set the environment"))]
    return " ".join(kept).replace("\t", " ")


def _describe(config_type: type, problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = _field_names(config_type, location[:-1])
        close = difflib.get_close_matches(location[-1], names, 1)
        prefix = ".".join([*location[:-1], ""])
        hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys here: {', '.join(names) or 'none'}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: required; type {key}=VALUE"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"


def _field_names(config_type: Any, location: list[str]) -> list[str]:
    """Fields of the dataclass that `location` leads to, through optional fields and mappings."""
    node: Any = config_type
    for part in location:
        arguments = [a for a in typing.get_args(node) if a is not type(None)]
        if dataclasses.is_dataclass(node):
            node = typing.get_type_hints(node).get(part)
        elif typing.get_origin(node) is dict:
            node = arguments[1]
        inner = [a for a in typing.get_args(node) if dataclasses.is_dataclass(a)]
        if not dataclasses.is_dataclass(node) and typing.get_origin(node) is not dict and inner:
            node = inner[0]
    return [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
