"""Public step times of dense bf16 training on H100 (80 GB, SXM), which the cost model is fitted on and checked against.

All are NVIDIA's, from the history of github.com/NVIDIA/dgxc-benchmarking: the step times of the README files, and the
layouts of the same files and of the configurations beside them. Each row names its file and commit.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepaudio_train.training.planner.cost import Layout, ModelSizes


@dataclass(frozen=True)
class Figure:
    """One published run."""

    model: str
    sizes: ModelSizes
    layout: Layout
    gpus: int
    step_s: float
    """Published seconds of an optimizer step."""
    source: str
    """File and commit."""


_GPT3_175B = ModelSizes(12288, 49152, 96, 96, 96, 51200, gated=False)
_NEMOTRON_15B = ModelSizes(6144, 24576, 32, 48, 8, 256000, gated=False)
_NEMOTRON_340B = ModelSizes(18432, 73728, 96, 96, 8, 256000, gated=False)
_LLAMA_8B = ModelSizes(4096, 14336, 32, 32, 8, 128256)
_LLAMA_70B = ModelSizes(8192, 28672, 80, 64, 8, 128256)
_LLAMA_405B = ModelSizes(16384, 53248, 126, 128, 8, 128256)


def _rows(model: str, sizes: ModelSizes, layout: Layout, source: str, steps_s: dict[int, float]) -> tuple[Figure, ...]:
    """A layout at several numbers of GPUs, the batch growing with them."""
    return tuple(Figure(model, sizes, layout.on(gpus), gpus, step_s, source) for gpus, step_s in steps_s.items())


def _shortened(layers: int) -> ModelSizes:
    return ModelSizes(16384, 53248, layers, 128, 8, 128256)


FIGURES: tuple[Figure, ...] = (
    # virtual_pipeline of gpt3_175b_hydra.yaml at the same commit (the README's heading says 12, its later table 6).
    *_rows(
        "GPT3-175B",
        _GPT3_175B,
        Layout(2048, tp=4, pp=8, vp=6, micro_batches=64),
        "nemo_megatron/README_175b.md@8f5cbb3",
        {128: 8.309, 256: 8.408, 512: 8.42, 1024: 8.453, 2048: 8.49},
    ),
    # nemotron4-15b-synth.yaml and nemotron4-340b-synth.yaml at 8f5cbb3: the second overlaps neither TP nor PP.
    *_rows(
        "Nemotron-15B",
        _NEMOTRON_15B,
        Layout(4096, tp=4, micro_rows=4, micro_batches=4),
        "nemotron/README_15b.md@0b71cfd",
        {16: 2.812, 32: 2.824, 64: 2.845, 128: 2.859, 256: 2.852, 512: 2.875, 1024: 2.895, 2048: 2.887},
    ),
    *_rows(
        "Nemotron-15B",
        _NEMOTRON_15B,
        Layout(4096, tp=2, micro_rows=2, micro_batches=4),
        "nemotron/README.md@85380ff",
        {16: 2.66, 32: 2.66, 64: 2.67, 128: 2.67, 256: 2.68, 512: 2.71, 1024: 2.74, 2048: 2.78},
    ),
    *_rows(
        "Nemotron-340B",
        _NEMOTRON_340B,
        Layout(4096, tp=8, pp=8, vp=12, micro_batches=16, overlaps_tp=False, overlaps_pp=False),
        "nemotron/README_340b.md@8f5cbb3",
        {128: 4.61, 256: 4.67, 512: 4.70, 1024: 4.73, 2048: 4.84},
    ),
    # virtual_pipeline of nemotron/launch.sh.
    *_rows(
        "Nemotron-340B",
        _NEMOTRON_340B,
        Layout(4096, tp=8, pp=8, vp=12, micro_batches=16),
        "nemotron/README.md@85380ff",
        {256: 4.36, 512: 4.39, 1024: 4.41, 2048: 4.43},
    ),
    *_rows(
        "Llama-3.1-8B",
        _LLAMA_8B,
        Layout(8192, cp=2, micro_batches=32),
        "llama3.1/README_8b.md@8f5cbb3",
        {8: 12.78, 16: 12.99, 32: 13.00, 64: 13.00, 128: 13.16},
    ),
    *_rows(
        "Llama-3.1-8B",
        _LLAMA_8B,
        Layout(8192, cp=2, micro_batches=32),
        "llama3.1/README.md@741c886",
        {8: 12.27, 16: 12.30, 32: 12.32, 64: 12.33, 128: 12.33},
    ),
    *_rows(
        "Llama-3.1-70B",
        _LLAMA_70B,
        Layout(8192, tp=4, cp=2, pp=4, vp=5, micro_batches=64),
        "llama3.1/README_70b.md@8f5cbb3",
        {64: 14.61, 128: 14.70, 256: 14.72, 512: 14.80, 1024: 14.86, 2048: 14.84},
    ),
    *_rows(
        "Llama-3.1-70B",
        _LLAMA_70B,
        Layout(8192, tp=4, cp=2, pp=4, vp=5, micro_batches=64),
        "llama3.1/README.md@741c886",
        {64: 14.66, 128: 14.67, 256: 14.68, 512: 14.67, 1024: 14.65, 2048: 14.66},
    ),
    *_rows(
        "Llama-3.1-405B",
        _LLAMA_405B,
        Layout(8192, tp=8, cp=2, pp=9, vp=7, micro_batches=63),
        "llama3.1/README_405b.md@8f5cbb3",
        {576: 17.50, 1152: 17.60, 2304: 17.70},
    ),
    # Embedding and head take a layer's place each: 126 + 2 layers over 8 x 8 chunks.
    *_rows(
        "Llama-3.1-405B",
        _LLAMA_405B,
        Layout(8192, tp=8, cp=2, pp=8, vp=8, micro_batches=64, ends_count_as_layers=True),
        "llama3.1/README.md@741c886",
        {512: 19.78, 1024: 19.84, 2048: 19.87},
    ),
    # The same model with fewer layers.
    *_rows(
        "Llama-3.1-405B",
        _shortened(7),
        Layout(8192, tp=8, cp=2, micro_batches=63),
        "llama3.1/README_405b.md@8f5cbb3",
        {32: 9.00},
    ),
    *_rows(
        "Llama-3.1-405B",
        _shortened(21),
        Layout(8192, tp=8, cp=2, pp=3, vp=7, micro_batches=63),
        "llama3.1/README_405b.md@8f5cbb3",
        {96: 8.87},
    ),
    *_rows(
        "Llama-3.1-405B",
        _shortened(42),
        Layout(8192, tp=8, cp=2, pp=3, vp=7, micro_batches=63),
        "llama3.1/README_405b.md@8f5cbb3",
        {192: 17.30},
    ),
    *_rows(
        "Llama-3.1-405B",
        _shortened(8),
        Layout(8192, tp=8, cp=2, micro_batches=32),
        "llama3.1/README.md@741c886",
        {32: 5.4},
    ),
    *_rows(
        "Llama-3.1-405B",
        _shortened(30),
        Layout(8192, tp=8, cp=2, pp=4, vp=8, micro_batches=64, ends_count_as_layers=True),
        "llama3.1/README.md@741c886",
        {64: 10.1},
    ),
    *_rows(
        "Llama-3.1-405B",
        _shortened(62),
        Layout(8192, tp=8, cp=2, pp=4, vp=8, micro_batches=64, ends_count_as_layers=True),
        "llama3.1/README.md@741c886",
        {128: 19.62},
    ),
)
