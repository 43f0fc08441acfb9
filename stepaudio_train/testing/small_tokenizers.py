"""Untrained speech tokenizers that are small enough for tests and still use many of their codes."""

from __future__ import annotations

import torch

from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer

LINGUISTIC = LinguisticConfig(hidden_size=32, ffn_size=48, num_blocks=2, codebook_size=50)
SEMANTIC = SemanticConfig(hidden_size=32, num_blocks=2, codebook_size=60)


def small_speech_tokenizer(
    linguistic: LinguisticConfig = LINGUISTIC, semantic: SemanticConfig = SEMANTIC
) -> SpeechTokenizer:
    """Both tokenizers on the CPU, the same weights each time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        first, second = LinguisticTokenizer(linguistic), SemanticTokenizer(semantic)
        first.cmvn_shift.normal_(-8.0)
        first.cmvn_scale.uniform_(0.1, 0.4)
        first.centroids.normal_()
        second.quantizer.codes.normal_(std=0.2)
    return SpeechTokenizer(first, second, "cpu")
