"""Changes of weights on their way from one place to another: each a reader around a reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.sources import Source, WeightReader
from stepaudio_train.convert.tensor_files import WeightError
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.weight_map import Entry, Kind


class CastWeights:
    """Weights in another dtype."""

    def __init__(self, reader: WeightReader, dtype: torch.dtype) -> None:
        self._reader, self.dtype = reader, dtype

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of one entry."""
        return {name: tensor.to(self.dtype) for name, tensor in self._reader.read(entry).items()}


class AveragedWeights:
    """The mean of several models' weights, each counting alike, in fp32: added up one model after the other."""

    dtype = torch.float32

    def __init__(self, sources: Sequence[Source]) -> None:
        """
        Args:
            sources: at least one.

        Raises:
            WeightError: their models have other sizes; the message names all of them.
        """
        for source in sources[1:]:
            _require_same_sizes(sources[0], source)
        self._readers = [source.reader for source in sources]

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of one entry."""
        first, *others = self._readers
        sums = {name: tensor.to(torch.float32, copy=True) for name, tensor in first.read(entry).items()}
        for reader in others:
            for name, tensor in reader.read(entry).items():
                sums[name] += tensor
        return {name: total.div_(len(self._readers)) for name, total in sums.items()}


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


def _require_same_sizes(first: Source, other: Source) -> None:
    # How long rows may be and how weights were once drawn are not in the weights.
    names = [field.name for field in fields(Step1Config) if field.name not in ("max_seq_len", "init_std")]
    ours, theirs = first.model, other.model
    different = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    if different:
        has = [", ".join(f"{name}={getattr(model, name)}" for name in different) for model in (theirs, ours)]
        raise WeightError(
            f"{other.path}: has {has[0]} where {first.path} has {has[1]}; only models of the same sizes can be averaged"
        )
