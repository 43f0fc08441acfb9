"""Typed, frozen configuration of the speech tokenizers and of their training. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class LinguisticConfig:
    """SAN-M encoder and centroids. The released tokenizer is 512 wide, 50 blocks deep, with 1024 codes."""

    __pydantic_config__ = _STRICT

    num_mel_bins: int = 80
    lfr_window: int = 7
    """Fbank frames put side by side in one encoder frame."""
    lfr_stride: int = 6
    """Fbank frames (10 ms) from one token to the next: 6 gives 16.7 tokens/s."""
    hidden_size: int = 128
    num_heads: int = 4
    ffn_size: int = 512
    num_blocks: int = 3
    kernel_size: int = 11
    """Taps of the memory block's depthwise convolution, in encoder frames."""
    codebook_size: int = 256
    """Centroids; at most the vocabulary's linguistic_size."""

    @property
    def input_size(self) -> int:
        return self.num_mel_bins * self.lfr_window


@dataclass(frozen=True)
class SemanticConfig:
    """Whisper-style encoder and codebook. The released tokenizer is 1280 wide, 6 blocks deep, with 4096 codes."""

    __pydantic_config__ = _STRICT

    num_mel_bins: int = 80
    """128 in the released tokenizer."""
    hidden_size: int = 128
    num_heads: int = 4
    num_blocks: int = 3
    codebook_size: int = 256
    """Codes; at most the vocabulary's semantic_size."""
    max_positions: int = 1500
    """Tokens of the longest piece encoded at once: 1500 are 60 s; longer recordings are cut into pieces of 30 s."""
