"""Changes of weights on their way from one place to another: each a reader around a reader."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.sources import WeightReader
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.weight_map import Entry, Kind


class CastWeights:
    """Weights in another dtype."""

    def __init__(self, reader: WeightReader, dtype: torch.dtype) -> None:
        self._reader, self.dtype = reader, dtype

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of one entry."""
        return {name: tensor.to(self.dtype) for name, tensor in self._reader.read(entry).items()}


class ResizedVocabulary:
    """A model's weights with more or fewer rows in the embedding and the head.

    New rows are the mean of the old ones plus the noise of a fresh initialisation: near what the model knows, and not
    all alike (stage 1 grows a text-only vocabulary, paper 4.2). Fewer rows cut off what tensor parallelism padded.
    """

    def __init__(self, reader: WeightReader, model: Step1Config, vocab_size: int, seed: int) -> None:
        self._reader, self.dtype = reader, reader.dtype
        self.model = replace(model, vocab_size=vocab_size)
        self._fresh = InitialWeights(self.model, seed)

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of one entry."""
        tensors = self._reader.read(entry)
        if entry.kind is not Kind.VOCAB:
            return tensors
        ((name, old),) = tensors.items()
        if old.shape[0] >= self.model.vocab_size:
            return {name: old[: self.model.vocab_size].clone()}
        resized = self._fresh[name] + old.float().mean(0)
        resized[: old.shape[0]] = old
        return {name: resized.to(old.dtype)}
