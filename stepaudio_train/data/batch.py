"""The packed batch: what the loader makes and every engine and objective takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

TASKS = (
    *("text", "continuation", "interleaved", "asr", "tts", "image"),
    *("tqta", "aqta", "taqta", "aqaa", "edit", "tool", "role_play"),
)
"""Tasks of pretraining, then those that conversations add. Index in this tuple is the task id in `TokenBatch.tasks`."""
_EXTRA = "extras."


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows of documents. R rows of T tokens; all tensors on one device.

    Row r holds whole documents one behind the other, then padding. A token attends to the tokens of its own document
    at or before it, to nothing else. Padding is a document of its own with loss weight 0.
    """

    input_ids: Tensor
    """[R, T] int64."""
    targets: Tensor
    """[R, T] int64: the id that follows within the document; where none follows, the pad id with weight 0."""
    loss_weights: Tensor
    """[R, T] float32: 0 for what is not predicted."""
    documents: Tensor
    """[R, T] int32: index of the token's document in its row, nondecreasing along the row."""
    tasks: Tensor
    """[R, T] int8: index in TASKS of the token's document."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Name -> [R, T]: more numbers of each token, such as what a reference policy gave its target. Objectives alone
    read them."""

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    def split(self, rows: int) -> list[TokenBatch]:
        """Micro-batches of `rows` rows each (the last may be smaller)."""
        named = {name: tensor.split(rows) for name, tensor in self.named_tensors().items()}
        parts = zip(*named.values(), strict=True)
        return [TokenBatch._of_named(dict(zip(named, part, strict=True))) for part in parts]

    def to(self, device: torch.device | str) -> TokenBatch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenBatch:
        """The batch of `function` of every tensor."""
        return TokenBatch._of_named({name: function(tensor) for name, tensor in self.named_tensors().items()})

    def named_tensors(self) -> dict[str, Tensor]:
        """Name of the field, or `extras.NAME` -> [R, T]: all that the batch holds."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extras"}
        return own | {_EXTRA + name: tensor for name, tensor in self.extras.items()}

    @staticmethod
    def concatenate(batches: list[TokenBatch]) -> TokenBatch:
        """All rows of `batches`, in order.

        Raises:
            ValueError: their `extras` have other names.
        """
        named = [batch.named_tensors() for batch in batches]
        if any(tensors.keys() != named[0].keys() for tensors in named):
            raise ValueError(f"batches with other extras: {[sorted(batch.extras) for batch in batches]}")
        return TokenBatch._of_named({name: torch.cat([tensors[name] for tensors in named]) for name in named[0]})

    @staticmethod
    def _of_named(named: dict[str, Tensor]) -> TokenBatch:
        """The inverse of `named_tensors`."""
        extras = {name.removeprefix(_EXTRA): tensor for name, tensor in named.items() if name.startswith(_EXTRA)}
        return TokenBatch(**{name: t for name, t in named.items() if not name.startswith(_EXTRA)}, extras=extras)
