"""Megatron-Energon's loader state as JSON, so that a checkpoint holds data and never code."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

_KIND = "_kind"
_CLASSES = {
    c.__name__: c
    for c in (SliceState, SystemRngState, SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState)
}


def state_to_json(value: Any) -> Any:
    """Plain JSON data for a loader's state.

    Raises:
        TypeError: the state holds something this project does not know; nothing is guessed.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [state_to_json(item) for item in value]
    if isinstance(value, tuple):
        return {_KIND: "tuple", "items": [state_to_json(item) for item in value]}
    if isinstance(value, bytes):
        return {_KIND: "bytes", "base64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.asarray(value)
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        content = base64.b64encode(array.tobytes()).decode("ascii")
        return {_KIND: kind, "dtype": array.dtype.str, "shape": list(array.shape), "base64": content}
    if isinstance(value, dict):
        kind = "flex" if isinstance(value, FlexState) else "dict"
        return {_KIND: kind, "items": [[state_to_json(k), state_to_json(v)] for k, v in value.items()]}
    name = type(value).__name__
    if _CLASSES.get(name) is type(value):
        return {_KIND: name, "fields": {f: state_to_json(getattr(value, f)) for f in value.__dataclass_fields__}}
    raise TypeError(f"a loader's state holds a {type(value).__qualname__}, which is not known here")


def state_from_json(value: Any) -> Any:
    """Undo `state_to_json`.

    Raises:
        ValueError: not something that `state_to_json` wrote.
    """
    if isinstance(value, list):
        return [state_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind == "tuple":
        return tuple(state_from_json(item) for item in value["items"])
    if kind == "bytes":
        return base64.b64decode(value["base64"])
    if kind in ("array", "tensor"):
        content = np.frombuffer(base64.b64decode(value["base64"]), np.dtype(value["dtype"]))
        array = content.reshape(value["shape"]).copy()
        return torch.from_numpy(array) if kind == "tensor" else array
    if kind in ("flex", "dict"):
        items = {state_from_json(k): state_from_json(v) for k, v in value["items"]}
        return FlexState(items) if kind == "flex" else items
    if kind in _CLASSES:
        return _CLASSES[kind](**{name: state_from_json(inner) for name, inner in value["fields"].items()})
    raise ValueError(f"unknown kind {kind!r} in a loader's state")
