"""Where training batches come from: one interface over made-up data and token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from stepaudio_train.config.schema import DataConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.synthetic import SyntheticLoader
from stepaudio_train.tokenizers.vocabulary import Vocabulary


class TrainLoader(Protocol):
    """An endless, deterministic sequence of batches that can be left and taken up again at any step."""

    def next_batch(self) -> TokenBatch:
        """This data-parallel rank's rows of the next global batch, on the CPU."""

    def save(self, directory: Path) -> None:
        """Write this rank's position into `directory`. Every data-parallel rank must call it."""

    def load(self, directory: Path) -> None:
        """Continue bit for bit where `save` was called, at any data-parallel size that divides the streams."""

    def close(self) -> None:
        """End worker processes, if there are any."""


def build_train_loader(
    config: DataConfig,
    vocabulary: Vocabulary,
    sequence_length: int,
    rows_per_step: int,
    seed: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    text_tokenizer: str | Path | None = None,
) -> TrainLoader:
    """The training data of `config`. All ranks of one data-parallel rank build the same loader and get the same.

    Args:
        rows_per_step: rows of the global batch, over all data-parallel ranks. Rank r gets the r-th equal run of rows.
        text_tokenizer: SentencePiece file; token shards hold text as text.

    Raises:
        ConfigError: everything that does not fit, at once.
    """
    layout = (sequence_length, rows_per_step, seed, data_parallel_rank, data_parallel_size)
    if config.source == "synthetic":
        return SyntheticLoader(config, vocabulary, *layout)
    # Megatron-Energon takes seconds to import, and made-up data does without.
    from stepaudio_train.data.shard_loader import ShardLoader

    return ShardLoader(config, vocabulary, *layout, _path(text_tokenizer))


def build_validation_batches(
    config: DataConfig,
    vocabulary: Vocabulary,
    sequence_length: int,
    rows_per_step: int,
    num_batches: int,
    seed: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    text_tokenizer: str | Path | None = None,
) -> list[TokenBatch]:
    """Up to `num_batches` fixed batches of held-out data, this rank's rows of each; the last rows may be padding.

    Args:
        rows_per_step: rows of each global batch, over all data-parallel ranks.
        seed: of made-up data. Held-out shards are read in their order.
        text_tokenizer: SentencePiece file; token shards hold text as text.

    Raises:
        ConfigError: everything that does not fit, at once.
    """
    replica = (data_parallel_rank, data_parallel_size)
    if config.source == "synthetic":
        loader = SyntheticLoader(config, vocabulary, sequence_length, rows_per_step, seed, *replica)
        return loader.validation_batches(num_batches)
    from stepaudio_train.data.shard_loader import validation_batches

    return validation_batches(
        config, vocabulary, sequence_length, rows_per_step, num_batches, *replica, _path(text_tokenizer)
    )


def _path(text_tokenizer: str | Path | None) -> Path | None:
    return None if text_tokenizer is None else Path(text_tokenizer)
