"""What released programs are built from, hyperpyyaml, as data: tags are kept as words, and nothing they name is run.

A document is flat here: `flow.encoder.num_blocks` -> 6, and `flow.encoder` -> the tag that stands above.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stepaudio_train.models.decoder.weights import DecoderWeightError

_REFERENCE = "!ref"
# YAML 1.2's numbers, which hyperpyyaml reads: PyYAML takes `1e-06` for a word.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")


@dataclass(frozen=True)
class Tagged:
    """What stands under a tag: `!new:module.Class`, `!name:module.function`, `!apply:module.function`, `!ref`."""

    tag: str
    value: Any
    """A mapping, a list or a word."""


class _Loader(yaml.SafeLoader):
    """Safe YAML, every tag of whose own kind becomes a `Tagged`."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        # A few bytes of aliases can stand for a document that fills the memory.
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _tagged(loader: _Loader, suffix: str, node: yaml.Node) -> Tagged:
    if isinstance(node, yaml.MappingNode):
        return Tagged(f"!{suffix}", loader.construct_mapping(node, deep=True))
    if isinstance(node, yaml.SequenceNode):
        return Tagged(f"!{suffix}", loader.construct_sequence(node, deep=True))
    return Tagged(f"!{suffix}", loader.construct_scalar(node))


_Loader.add_multi_constructor("!", _tagged)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """Mappings as blocks, lists in a line."""


def _represent_tagged(dumper: _Dumper, tagged: Tagged) -> yaml.Node:
    if isinstance(tagged.value, list):
        return dumper.represent_sequence(tagged.tag, tagged.value, flow_style=True)
    return dumper.represent_mapping(tagged.tag, tagged.value)


_Dumper.add_representer(Tagged, _represent_tagged)
_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def read_flat(path: Path, parts: Iterable[str]) -> dict[str, Any]:
    """These parts of a document, flat; those that it lacks are left out, and the rest of it is not looked at.

    Raises:
        DecoderWeightError: missing or broken file, or something other than names and values; the key is named.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DecoderWeightError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(document, dict):
        raise DecoderWeightError(f"{path}: holds no names and values")
    try:
        return {
            key: value for part in parts if part in document for key, value in _flat(part, document[part], document)
        }
    except ValueError as error:
        raise DecoderWeightError(f"{path}: {error}") from None


def dump_flat(flat: Mapping[str, Any]) -> str:
    """A flat document as YAML, in its order; a tag stands before what is under it."""
    document: dict[str, Any] = {}
    for path, value in flat.items():
        *above, key = path.split(".")
        place = document
        for name in above:
            node = place.setdefault(name, {})
            place = node.value if isinstance(node, Tagged) else node
        place[key] = Tagged(value, {}) if isinstance(value, str) and value.startswith("!") else value
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, default_flow_style=False)


def _flat(path: str, node: Any, document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Tagged) and node.tag != _REFERENCE:
        yield path, node.tag
        node = node.value or {}
        if not isinstance(node, dict):
            raise ValueError(f"{path}={node}: arguments must have names")
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(f"{path}.{key}", value, document)
    else:
        yield path, _value(path, node, document)


def _value(path: str, node: Any, document: Mapping[str, Any]) -> Any:
    """A number, a word or a list of such, references resolved."""
    if isinstance(node, list):
        return [_value(path, item, document) for item in node]
    if isinstance(node, Tagged):
        name = str(node.value).strip().removeprefix("<").removesuffix(">")
        node = document.get(name, node) if node.tag == _REFERENCE else node
    if isinstance(node, Tagged):
        raise ValueError(f"{path}={node.tag} {node.value}: must be a value, or !ref <name> of one")
    if isinstance(node, (dict, list)):
        raise ValueError(f"{path}={node}: must be a value")
    return node
