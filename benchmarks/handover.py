"""Handing a policy's weights over to the model that generates for it: time, rate, and peak memory of every rank.

    .venv/bin/python benchmarks/handover.py [KEY=VALUE ...] [--refreshes N] [--json FILE] [--only WORD ...]

Every layout hands over N times after a first one that is not counted; told is the fastest, since other work on the
machine only adds. Then every rank that generates compares its weights with what the engine exports, bit by bit: the
program fails if they differ. Memory is resident memory at its fullest while the rollout model is made and filled, above
what the rank held with its engine alone; beside it is what `HandoverReport` says. Large tensors lie in mappings of
their own: what is freed is given back at once.
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

from stepaudio_train.config.compose import load_config
from stepaudio_train.config.rollout import RolloutConfig
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.engines.base import Engine
from stepaudio_train.engines.build import build_engine
from stepaudio_train.engines.process_group import join_process_group
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.rollout.rollouts import HandoverReport, RolloutModel
from stepaudio_train.testing.distributed import run_distributed

SHARED = ("model=step1_60m", "engine.device=cpu", "training.global_batch_rows=4")
# What a layout's name begins with: what its processes find imported.
PRELOAD = {
    "megatron": "stepaudio_train.engines.megatron.engine",
    "deepspeed": "stepaudio_train.engines.deepspeed.zero",
}
TP2_PP2 = ("engine=megatron", "engine.tensor_parallel=2", "engine.pipeline_parallel=2")
# name -> processes, overrides
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "megatron fp32 TP=2 PP=2": (4, TP2_PP2),
    "megatron bf16 TP=2 PP=2": (4, (*TP2_PP2, "engine.precision=bf16")),
    "megatron bf16 TP=2 DP=2": (4, ("engine=megatron", "engine.tensor_parallel=2", "engine.precision=bf16")),
    "deepspeed bf16 ZeRO-3": (2, ("engine=deepspeed", "engine.zero_stage=3", "engine.precision=bf16")),
    "local fp32": (1, ("engine=local",)),
}


@dataclass(frozen=True)
class Measured:
    """Of one rank."""

    report: HandoverReport
    """Of the fastest handover."""
    peak_bytes: int
    """Above what the rank held before it had a rollout model."""


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--refreshes", type=int, default=5, metavar="N", help="handovers that are timed")
    options.add_argument("--only", nargs="+", metavar="WORD", help="layouts whose names hold one of these words")
    options.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes for all layouts")
    chosen = options.parse_intermixed_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Read by the C library when a process starts: mappings of their own for all but small tensors.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    rows: list[dict[str, Any]] = []
    names = [name for name in LAYOUTS if not chosen.only or any(word in name for word in chosen.only)]
    preload = [module for start, module in PRELOAD.items() if any(name.startswith(start) for name in names)]
    for name in names:
        processes, overrides = LAYOUTS[name]
        typed = (*SHARED, *overrides, *chosen.overrides)
        ranks = run_distributed(measure, processes, typed, chosen.refreshes, preload=preload)
        for rank, measured in enumerate(ranks):
            print(f"{name}, rank {rank}: {measured}", file=sys.stderr, flush=True)
            rows.append(_row(name, rank, measured))
    report("Handover of weights to rollouts", rows, chosen.json)


def _row(name: str, rank: int, measured: Measured) -> dict[str, Any]:
    handover = measured.report
    return {
        "layout": name,
        "rank": rank,
        "seconds": handover.seconds,
        "GB/s": handover.num_bytes / handover.seconds / 1e9,
        "model, MiB": handover.num_bytes / 2**20,
        "peak as reported, MiB": handover.peak_extra_bytes / 2**20,
        "peak measured, MiB": measured.peak_bytes / 2**20,
    }


def measure(overrides: Sequence[str], refreshes: int) -> Measured:
    """What this process of a distributed run takes for handing over its weights.

    Raises:
        RuntimeError: what was handed over is not what the engine exports.
    """
    config = load_config("pretrain", PretrainConfig, overrides)
    if config.engine.name != "local":
        join_process_group(torch.device("cpu"))
    small = replace(config.model, hidden_size=64, intermediate_size=128)
    _hand_over(replace(config, model=small), 1)
    gc.collect()
    measured = _hand_over(config, refreshes)
    if config.engine.name != "local":
        dist.destroy_process_group()
    return measured


def _hand_over(config: PretrainConfig, refreshes: int) -> Measured:
    engine = build_engine(config)
    engine.load_weights(InitialWeights(config.model, config.training.seed))
    gc.collect()
    before = resident_bytes()
    forget_peak()
    rollouts = RolloutModel(engine, RolloutConfig())
    rollouts.refresh(engine)
    reports = [rollouts.refresh(engine) for _ in range(refreshes)]
    peak = peak_resident_bytes() - before
    _compare(engine, rollouts)
    engine.close()
    return Measured(min(reports, key=lambda report: report.seconds), peak)


def _compare(engine: Engine, rollouts: RolloutModel) -> None:
    found = rollouts.weights()
    for name, tensor in engine.full_weights(torch.device("cpu"), every_replica=True):
        if not torch.equal(found[name], tensor.to(found[name].dtype)):
            raise RuntimeError(f"rank {engine.rank}: {name} is not what the engine exports")


if __name__ == "__main__":
    main()
