"""Peak memory of training steps on a CPU, against what `stepaudio plan` says: engines and layouts at a small size.

    .venv/bin/python benchmarks/memory.py [KEY=VALUE ...] [--json FILE] [--only WORD ...]

Each layout trains in fresh processes. Counted is the resident memory of a rank at its fullest during two steps, above
what the process held before its engine was built; a tiny engine has been built, run and closed before that, so that
libraries are loaded. Large tensors lie in mappings of their own: what is freed is given back at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from reporting import parser, report
from resident import forget_peak, peak_resident_bytes, resident_bytes

from stepaudio_train.config.checks import layout_problems
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.data.synthetic import SyntheticLoader
from stepaudio_train.engines.build import build_engine
from stepaudio_train.engines.process_group import join_process_group
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.plan import plan_run

SHARED = (
    "model=step1_60m",
    "model.hidden_size=1024",
    "model.intermediate_size=2816",
    "engine.device=cpu",
    "training.sequence_length=512",
    "training.micro_batch_rows=1",
    "training.global_batch_rows=4",
)
# DeepSpeed's buckets are counted whole, and a CPU pays only for the pages that are written: ones that get filled.
BUCKETS = (
    "engine.extra.zero_optimization.reduce_bucket_size=8000000",
    "engine.extra.zero_optimization.allgather_bucket_size=8000000",
    "engine.extra.zero_optimization.stage3_prefetch_bucket_size=8000000",
)
STEPS = 2
# What a layout's overrides begin with: what its processes find imported.
PRELOAD = {
    "engine=megatron": "stepaudio_train.engines.megatron.engine",
    "engine=deepspeed": "stepaudio_train.engines.deepspeed.zero",
    "lora.": "peft",
}


@dataclass(frozen=True)
class Layout:
    """One line of the table (one for each pipeline stage)."""

    name: str
    processes: int
    overrides: tuple[str, ...]


def _deepspeed(stage: int, *more: str) -> tuple[str, ...]:
    return ("engine=deepspeed", f"engine.zero_stage={stage}", *BUCKETS, *more)


LAYOUTS = (
    Layout("local fp32", 1, ("engine=local",)),
    Layout("local fp32, one micro-batch", 1, ("engine=local", "training.micro_batch_rows=4")),
    Layout("local fp32, recompute full", 1, ("engine=local", "engine.recompute=full")),
    Layout("local bf16", 1, ("engine=local", "engine.precision=bf16")),
    Layout("local bf16, recompute full", 1, ("engine=local", "engine.precision=bf16", "engine.recompute=full")),
    Layout("local fp32, LoRA", 1, ("engine=local", "lora.rank=16")),
    Layout("local bf16, LoRA", 1, ("engine=local", "engine.precision=bf16", "lora.rank=16")),
    Layout(
        "local bf16, LoRA, recompute full",
        1,
        ("engine=local", "engine.precision=bf16", "lora.rank=16", "engine.recompute=full"),
    ),
    Layout("megatron fp32", 1, ("engine=megatron",)),
    Layout("megatron bf16", 1, ("engine=megatron", "engine.precision=bf16")),
    Layout("megatron fp32 TP=2", 2, ("engine=megatron", "engine.tensor_parallel=2")),
    Layout("megatron fp32 PP=2", 2, ("engine=megatron", "engine.pipeline_parallel=2")),
    Layout("megatron fp32 CP=2", 2, ("engine=megatron", "engine.context_parallel=2")),
    Layout("megatron fp32 DP=2", 2, ("engine=megatron",)),
    Layout("megatron bf16 DP=2", 2, ("engine=megatron", "engine.precision=bf16")),
    Layout(
        "megatron fp32 TP=2, recompute full",
        2,
        ("engine=megatron", "engine.tensor_parallel=2", "engine.recompute=full"),
    ),
    *(
        Layout(f"deepspeed {precision} ZeRO-{stage}", 2, _deepspeed(stage, f"engine.precision={precision}"))
        for precision in ("bf16", "fp32")
        for stage in (1, 2, 3)
    ),
    Layout("deepspeed bf16 ZeRO-3, recompute full", 2, _deepspeed(3, "engine.precision=bf16", "engine.recompute=full")),
    Layout("deepspeed bf16 ZeRO-2, offload", 2, _deepspeed(2, "engine.precision=bf16", "engine.offload=optimizer")),
    Layout("deepspeed bf16 ZeRO-3, offload", 2, _deepspeed(3, "engine.precision=bf16", "engine.offload=optimizer")),
    Layout("deepspeed bf16 ZeRO-3, offload all", 2, _deepspeed(3, "engine.precision=bf16", "engine.offload=all")),
    Layout("deepspeed bf16 ZeRO-2, LoRA", 2, _deepspeed(2, "engine.precision=bf16", "lora.rank=16")),
    Layout("deepspeed bf16 ZeRO-3, LoRA", 2, _deepspeed(3, "engine.precision=bf16", "lora.rank=16")),
)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--only", nargs="+", metavar="WORD", help="layouts whose names hold one of these words")
    options.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes for all layouts")
    chosen = options.parse_intermixed_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Read by the C library when a process starts: mappings of their own for all but small tensors.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    # oneDNN keeps kernels for every shape that it has met, and packed rows have many: libraries, not the model.
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "8"
    rows: list[dict[str, Any]] = []
    layouts = [x for x in LAYOUTS if not chosen.only or any(word in x.name for word in chosen.only)]
    typed = [override for layout in layouts for override in layout.overrides]
    preload = [module for start, module in PRELOAD.items() if any(x.startswith(start) for x in typed)]
    for layout in layouts:
        for row in _rows(layout, (*SHARED, *layout.overrides, *chosen.overrides), preload):
            print(", ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)
            rows.append(row)
    report("Peak memory of a rank, MiB", rows, chosen.json)


def _rows(layout: Layout, overrides: Sequence[str], preload: Sequence[str]) -> list[dict[str, Any]]:
    config = load_config("pretrain", PretrainConfig, overrides)
    problems = layout_problems(replace(config, model=replace(config.model, init="-")), layout.processes)
    if problems:
        raise ConfigError(problems)
    plan = plan_run(config, layout.processes)
    measured = run_distributed(measure, layout.processes, tuple(overrides), preload=preload)
    ranks = layout.processes // len(plan.stages)
    rows = []
    for stage in plan.stages:
        peak = max(measured[stage.stage * ranks : (stage.stage + 1) * ranks])
        planned = stage.total + stage.host
        rows.append(
            {
                "layout": layout.name,
                "ranks": layout.processes,
                "stage": stage.stage,
                "planned": planned / 2**20,
                "measured": peak / 2**20,
                "planned / measured": planned / peak,
            }
        )
    return rows


def measure(overrides: Sequence[str]) -> int:
    """Bytes that this process of a distributed run takes for training, at its fullest."""
    config = load_config("pretrain", PretrainConfig, overrides)
    if config.engine.name != "local":
        join_process_group(torch.device("cpu"))
    small = replace(config.model, hidden_size=64, intermediate_size=128)
    _train(replace(config, model=small, training=replace(config.training, sequence_length=64)))
    gc.collect()
    before = resident_bytes()
    peak = _train(config)
    if config.engine.name != "local":
        dist.destroy_process_group()
    return peak - before


def _train(config: PretrainConfig) -> int:
    engine = build_engine(config)
    training, vocabulary = config.training, Vocabulary.from_config(config.vocabulary)
    engine.load_weights(InitialWeights(config.model, training.seed))
    replica = (engine.data_parallel_rank, engine.data_parallel_size)
    rows = (training.sequence_length, training.global_batch_rows)
    loader = SyntheticLoader(config.data, vocabulary, *rows, training.seed, *replica)
    # Building takes other memory than training does: the plan is of the steps.
    forget_peak()
    for _ in range(STEPS):
        batches = loader.next_batch().split(training.micro_batch_rows)
        engine.train_step(batches, LanguageModelling(vocabulary), 1e-4)
    peak = peak_resident_bytes()
    engine.close()
    return peak


if __name__ == "__main__":
    main()
