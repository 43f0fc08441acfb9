"""Which id means what: one layout for the released vocabulary and for small ones (formats.md 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from stepaudio_train.config.schema import VocabularyConfig


class Modality(IntEnum):
    """What a token is. Losses are reported per modality."""

    TEXT = 0
    LINGUISTIC = 1
    SEMANTIC = 2


class Special(IntEnum):
    """Ids of the released control pieces; the same in every vocabulary of this project."""

    UNK = 0
    BOS = 1
    EOS = 2
    EOT = 3
    BOT = 4
    CALL_START = 5
    CALL_END = 6
    AUDIO_START = 31
    AUDIO_END = 32
    TEXT_START = 33
    TEXT_END = 34
    TTS = 35
    ASR = 36
    TQAA = 37
    AQTA = 38


FIRST_BYTE_ID = 68
FIRST_PIECE_ID = 324
PAD_ID = int(Special.UNK)
"""The released pad_token_id is 0, which is also <unk>."""


@dataclass(frozen=True)
class Vocabulary:
    """Id ranges, in order: text (special 0-67, bytes 68-323, pieces), linguistic, semantic, reserved.

    The text form of an audio id is `<audio_k>` with k = id - text_size, as released.
    """

    text_size: int
    linguistic_size: int = 1024
    semantic_size: int = 4096
    reserved_size: int = 4096

    @classmethod
    def from_config(cls, config: VocabularyConfig) -> Vocabulary:
        return cls(config.text_size, config.linguistic_size, config.semantic_size, config.reserved_size)

    @property
    def linguistic_offset(self) -> int:
        return self.text_size

    @property
    def semantic_offset(self) -> int:
        return self.text_size + self.linguistic_size

    @property
    def audio_end(self) -> int:
        """One past the last semantic id."""
        return self.semantic_offset + self.semantic_size

    @property
    def total_size(self) -> int:
        return self.audio_end + self.reserved_size

    def modality(self, ids: Tensor) -> Tensor:
        """Modality of each id, int8, same shape. Reserved ids count as text."""
        linguistic = (ids >= self.linguistic_offset) & (ids < self.semantic_offset)
        semantic = (ids >= self.semantic_offset) & (ids < self.audio_end)
        return linguistic.to(torch.int8) * Modality.LINGUISTIC + semantic.to(torch.int8) * Modality.SEMANTIC

    def padded_size(self, multiple: int) -> int:
        """Rows of an embedding that `multiple` ranks can share evenly. Padding rows never reach a checkpoint."""
        return -(-self.total_size // multiple) * multiple


AUDIO_IDS = Vocabulary(text_size=0)
"""Audio ids counted from the first linguistic one, as the speech decoder takes them: `<audio_k>` is id k."""
