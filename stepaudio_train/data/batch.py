"""The packed batch: what the loader makes and every engine and objective takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

TASKS = (
    *("text", "continuation", "interleaved", "asr", "tts", "image"),
    *("tqta", "aqta", "taqta", "aqaa", "edit", "tool", "role_play"),
)
"""Tasks of pretraining, then those that conversations add. Index in this tuple is the task id in `TokenBatch.tasks`."""


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

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    def split(self, rows: int) -> list[TokenBatch]:
        """Micro-batches of `rows` rows each (the last may be smaller)."""
        parts = zip(*(getattr(self, f.name).split(rows) for f in fields(self)), strict=True)
        return [TokenBatch(*part) for part in parts]

    def to(self, device: torch.device | str) -> TokenBatch:
        return TokenBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    @staticmethod
    def concatenate(batches: list[TokenBatch]) -> TokenBatch:
        """All rows of `batches`, in order."""
        return TokenBatch(*(torch.cat([getattr(b, f.name) for b in batches]) for f in fields(TokenBatch)))
