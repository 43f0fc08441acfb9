"""`stepaudio plan`: will it fit, and what to change if not; with `--gpus`, the fastest layout of a cluster."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from stepaudio_train.commands.plan_layouts import PAPER_TOKENS, show_figures, show_layouts
from stepaudio_train.config.checks import layout_problems, replica_ranks
from stepaudio_train.config.compose import load_config, save_config
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.gpus import GPUS, GpuName
from stepaudio_train.config.policy_runs import GrpoRunConfig, PolicyRunConfig, PpoRunConfig
from stepaudio_train.config.preference_runs import DpoRunConfig, RewardConfig
from stepaudio_train.config.schema import PretrainConfig, RunConfig
from stepaudio_train.config.sft import SftConfig
from stepaudio_train.training.planner.search import Cluster

if TYPE_CHECKING:
    from stepaudio_train.training.plan import RunPlan

Recipe = Literal["pretrain", "sft", "reward", "dpo", "ppo", "grpo"]
_CONFIGS: dict[Recipe, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoRunConfig,
    "ppo": PpoRunConfig,
    "grpo": GrpoRunConfig,
}


@dataclass(frozen=True)
class PlanOptions:
    """What `stepaudio plan` is asked."""

    overrides: Sequence[str] = ()
    recipe: Recipe = "pretrain"
    """Which `configs/RECIPE.yaml` they change."""
    world_size: int | None = None
    """Ranks in all; None: those of one model replica."""
    memory_gib: float | None = None
    """Memory of a device; None: not compared, or that of `gpu`."""
    write_config: Path | None = None
    parameters_json: Path | None = None
    gpus: int | None = None
    """Search the fastest layout on so many; None: plan the one that is typed."""
    gpu: GpuName = "h800"
    """Which."""
    tokens: float | None = None
    """How many are trained on; None: the paper's 3.3e12."""
    document_tokens: int | None = None
    """Mean length of the documents in a row; None: one fills it."""
    checkpoint_gb_per_s: float | None = None
    """What the storage takes from all ranks together; None: checkpoints are not counted."""
    json: Path | None = None
    """File for what `gpus` or `check_figures` print."""
    check_figures: bool = False
    """Compare the search's predictions with published figures instead."""


def show_plan(options: PlanOptions) -> int:
    """Print the plan of a recipe's configuration with overrides. Exit status 1: it does not fit `memory_gib`.

    Raises:
        ConfigError: the configuration or its layout is refused. Data and weights are not looked at.
        UserError: options that do not go together.
    """
    if options.check_figures:
        return show_figures(options.json)
    config = load_config(options.recipe, _CONFIGS[options.recipe], options.overrides)
    if options.gpus is not None:
        return _search(options, config)
    ranks = options.world_size or replica_ranks(config.engine)
    # Adapters need weights to adapt; which ones does not matter here.
    started = replace(config, model=replace(config.model, init=config.model.init or "DIR"))
    problems = layout_problems(started, ranks)
    if problems:
        raise ConfigError(problems)
    # Only now: they bring in torch, which takes seconds, and a refusal should take none.
    from stepaudio_train.models.step1.weight_map import hf_shapes
    from stepaudio_train.training.plan import plan_run
    from stepaudio_train.training.plan_remedies import remedies

    if options.write_config is not None:
        save_config(config, options.write_config)
    if options.parameters_json is not None:
        shapes = {name: list(shape) for name, shape in hf_shapes(config.model).items()}
        options.parameters_json.write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")
    console = Console()
    plan = plan_run(config, ranks)
    _show(console, plan)
    if options.memory_gib is None:
        return 0
    memory_gib = options.memory_gib
    if plan.peak <= memory_gib * 2**30:
        console.print(f"It fits: {_gib(plan.peak)} of {memory_gib:g} GiB on the fullest rank.")
        return 0
    console.print(f"It does not fit: {_gib(plan.peak)} GiB on the fullest rank, {memory_gib:g} GiB there are.")
    found = remedies(config, ranks, memory_gib * 2**30)
    for remedy in found:
        changes = [shlex.quote(override) for override in remedy.overrides]
        changes += [f"--world-size {remedy.world_size}"] if remedy.world_size != ranks else []
        host = f", {_gib(remedy.host)} GiB of host memory each" if remedy.host else ""
        told = f"It would ({_gib(remedy.peak)} GiB, {remedy.world_size} ranks{host}) with: {' '.join(changes)}"
        console.print(told, soft_wrap=True)
    if not found:
        console.print("No layout of this model and row length fits; type a smaller training.sequence_length or model=.")
    return 1


def _search(options: PlanOptions, config: RunConfig) -> int:
    if options.world_size is not None:
        raise UserError("--world-size plans one layout and --gpus searches for the best: type one of them")
    if isinstance(config, PolicyRunConfig):
        raise UserError(
            f"--gpus: knows what a training step takes, not what drawing answers does; type --world-size to plan one "
            f"layout of {options.recipe}"
        )
    assert options.gpus is not None
    gpu, rate = GPUS[options.gpu], options.checkpoint_gb_per_s
    return show_layouts(
        config,
        Cluster(gpu, options.gpus, gpu.memory_gib if options.memory_gib is None else options.memory_gib),
        tokens=PAPER_TOKENS if options.tokens is None else options.tokens,
        document_tokens=options.document_tokens,
        checkpoint_bytes_per_s=None if rate is None else rate * 1e9,
        file=options.json,
    )


def _show(console: Console, plan: RunPlan) -> None:
    console.print(
        f"{plan.parameters:,} parameters; {plan.world_size} ranks, {plan.data_parallel} model replica(s), "
        f"{plan.micro_batches} micro-batch(es) a step on each",
        soft_wrap=True,
    )
    states = ("weights", "gradients", "optimizer", "buffers")
    columns = ("stage", "parameters", *states, "activations", "models", "runtime", "total", "host")
    rows = [
        (
            str(stage.stage),
            _count(stage.parameters),
            *(_gib(n) for n in (stage.weights, stage.gradients, stage.optimizer, stage.buffers)),
            *(_gib(n) for n in (stage.activations, stage.models, stage.runtime, stage.total, stage.host)),
        )
        for stage in plan.stages
    ]
    # In a terminal of 80 columns there is room for those that say something.
    said = {
        "stage": len(plan.stages) > 1,
        "buffers": any(stage.buffers for stage in plan.stages),
        "models": any(stage.models for stage in plan.stages),
        "host": any(stage.host for stage in plan.stages),
    }
    shown = [index for index, column in enumerate(columns) if said.get(column, True)]
    table = Table(*(columns[i] for i in shown), box=SIMPLE, pad_edge=False, padding=0)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    table.caption = "per rank, GiB; how each is counted: stepaudio_train/training/plan.py"
    console.print(table)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _gib(num_bytes: float) -> str:
    value = num_bytes / 2**30
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f}"
