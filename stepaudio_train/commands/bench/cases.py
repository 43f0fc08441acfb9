"""What `stepaudio bench attention`, `head` and `step` compute: a model's sizes, and a batch of packed speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from stepaudio_train.commands.bench.timing import Contender, Timing, Work
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.data.batch import TASKS, TokenBatch
from stepaudio_train.data.packing import Document, choose_rows, pack_rows
from stepaudio_train.engines.precision import choose_device, choose_dtype

SizeName = Literal["small", "slice_130b", "3b"]

_MEDIAN_S, _SPREAD, _LONGEST_S = 6.0, 0.7, 30.0
"""Durations are log-normal, as those of segmented speech are, and cut at the longest."""
_GROUP_S = 0.12
_TOKENS_PER_GROUP, _OTHER_TOKENS = 5, 6
_DOCUMENTS_TO_CHOOSE_FROM = 256


@dataclass(frozen=True)
class _Size:
    overrides: tuple[str, ...]
    apart: bool
    """Models of this size do not fit into memory beside each other."""


_SIZES: Mapping[SizeName, _Size] = {
    "small": _Size(("training.sequence_length=2048",), apart=False),
    # Two of 88 layers at full width, and the head.
    "slice_130b": _Size(
        ("model=step1_130b", "model.num_hidden_layers=2", "vocabulary=released", "training.sequence_length=8192"),
        apart=True,
    ),
    "3b": _Size(("model=step1_3b", "vocabulary=released", "training.sequence_length=8192"), apart=True),
}


@dataclass(frozen=True)
class BenchOptions:
    """What `stepaudio bench attention`, `head` and `step` take."""

    size: SizeName = "small"
    rounds: int = 6
    """Each contender is timed so often."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the device multiplies it natively."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: Path | None = None


@dataclass(frozen=True)
class Case:
    """One size on one device."""

    config: PretrainConfig
    batch: TokenBatch
    """One packed row, on the device."""
    documents: tuple[Document, ...]
    """Those of the row."""
    device: torch.device
    dtype: torch.dtype
    apart: bool

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(map(len, self.documents))

    @property
    def squared_lengths(self) -> int:
        """Pairs of tokens that attention joins, twice over."""
        return sum(len(document) ** 2 for document in self.documents)

    @property
    def title(self) -> str:
        return (
            f"{self.num_tokens:,} tokens in {len(self.documents)} documents, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"
        )


def build_case(options: BenchOptions) -> Case:
    """The sizes and the batch of `options`; nothing is computed yet.

    Raises:
        UserError: there is nothing to time.
    """
    require_positive(rounds=options.rounds)
    size = _SIZES[options.size]
    fixed = (f"engine.device={options.device}", f"engine.precision={options.precision}")
    rows = ("training.global_batch_rows=1", "training.micro_batch_rows=1", "optimizer.learning_rate=1e-4")
    config = load_config("pretrain", PretrainConfig, [*size.overrides, *fixed, *rows])
    device = choose_device(options.device)
    documents = speech_row(config.training.sequence_length, config.model.vocab_size)
    batch = pack_rows([documents], config.training.sequence_length).to(device)
    dtype = choose_dtype(options.precision, device)
    return Case(config, batch, tuple(documents), device, dtype, size.apart)


def require_positive(**counts: int) -> None:
    """Raises UserError naming every option of `counts` that is under 1."""
    problems = [f"--{name.replace('_', '-')} {n}: must be at least 1" for name, n in counts.items() if n < 1]
    if problems:
        raise UserError("\n".join(problems))


def speech_row(sequence_length: int, vocab_size: int) -> list[Document]:
    """Documents that fill a row, their lengths those of segmented speech, their ids drawn evenly."""
    random = np.random.default_rng(0)
    lengths = [document_tokens(s) for s in speech_durations_s(_DOCUMENTS_TO_CHOOSE_FROM)]
    usable = [length for length in lengths if length <= sequence_length]
    row = choose_rows(usable, sequence_length)[0]
    ids = (random.integers(1, vocab_size, usable[index]).astype(np.int32) for index in row)
    return [Document(each, np.ones(len(each), np.float32), TASKS.index("continuation")) for each in ids]


def speech_durations_s(count: int, seed: int = 0) -> np.ndarray:
    """[count] float64: as long as the pieces are that speech is cut into."""
    drawn = np.random.default_rng(seed).lognormal(np.log(_MEDIAN_S), _SPREAD, count)
    return np.clip(drawn, 0.5, _LONGEST_S)


def num_groups(duration_s: float) -> int:
    """Groups of two linguistic and three semantic tokens of a recording."""
    return int(duration_s / _GROUP_S)


def document_tokens(duration_s: float) -> int:
    """Tokens of a recording's document, those about it too."""
    return _TOKENS_PER_GROUP * num_groups(duration_s) + _OTHER_TOKENS


def products(shapes: Sequence[tuple[int, int, int]], device: torch.device, dtype: torch.dtype) -> Contender:
    """The ceiling: matrix products [m, k] x [k, n] alone, of `shapes` (m, k, n), those of the model itself."""

    def build() -> Work:
        pairs = [
            (torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype))
            for m, k, n in shapes
        ]
        return lambda: [a @ b.T for a, b in pairs]

    return Contender("matrix products alone", build)


def products_flops(shapes: Sequence[tuple[int, int, int]]) -> float:
    """FLOPs of `products`."""
    return sum(2.0 * m * k * n for m, k, n in shapes)


def rows_of(contenders: Sequence[Contender], timings: Sequence[Timing], flops: Sequence[float]) -> list[dict[str, Any]]:
    """A line for each contender. The first is ours, the last the products alone, whose rate is the ceiling.

    Args:
        flops: of each contender, what is useful of them: the same for all that compute the same.
    """
    rates = [count / t.median_s if t.median_s else None for count, t in zip(flops, timings, strict=True)]
    ceiling = rates[-1]
    return [
        {
            "what": contender.name,
            "ms": 1e3 * timing.median_s if timing.median_s else None,
            "processor ms": 1e3 * timing.median_processor_s if timing.median_processor_s else None,
            "GFLOP/s": rate / 1e9 if rate else None,
            "of the products": rate / ceiling if rate and ceiling else None,
            "times ours": timing.against(timings[0]),
        }
        for contender, timing, rate in zip(contenders, timings, rates, strict=True)
    ]


def leave_process_group() -> None:
    """Of one process, which Megatron-Core needs even there; nothing if none was joined."""
    if dist.is_initialized():
        # Here, since what needs no Megatron-Core should not wait for its import.
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
