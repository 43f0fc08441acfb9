"""`stepaudio plan --gpus N`: the fastest layouts of a cluster; `--check-figures`: how well such predictions hold."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import RunConfig
from stepaudio_train.data.files import write_atomically
from stepaudio_train.training.planner.calibration import FITTED, Check, check_figures
from stepaudio_train.training.planner.cost import StepTime
from stepaudio_train.training.planner.search import (
    Candidate,
    Cluster,
    Found,
    checkpoint_s,
    search,
    slower_by,
    training_days,
)

PAPER_TOKENS = 3.3e12
"""All three stages of pretraining (paper 4.1)."""
_SHOWN = 8
_PARTS = {
    "matmul": "matmuls",
    "attention": "attention",
    "elementwise": "elementwise",
    "head": "head",
    "recompute": "recomputation",
    "tensor_comm": "TP's communication",
    "context_comm": "CP's communication",
    "pipeline_comm": "PP's sends",
    "bubble": "bubble",
    "data_comm": "DP's communication",
    "update": "update",
}


def show_layouts(
    config: RunConfig,
    cluster: Cluster,
    tokens: float = PAPER_TOKENS,
    document_tokens: int | None = None,
    checkpoint_bytes_per_s: float | None = None,
    file: Path | None = None,
) -> int:
    """Print the best layouts of a run on a cluster, and what to type for the first. Exit status 1: none fits.

    Raises:
        ConfigError: an impossible question, or no layout that the engine takes.
    """
    problems = _problems(config, cluster, tokens, document_tokens, checkpoint_bytes_per_s)
    if problems:
        raise ConfigError(problems)
    found = search(config, cluster, document_tokens)
    stop_s = checkpoint_s(config, checkpoint_bytes_per_s) if checkpoint_bytes_per_s else 0.0
    console = Console()
    console.print(
        f"{found.tried:,} layouts on {cluster.gpus:,} GPUs of {cluster.memory_gib:g} GiB, {tokens:.3g} tokens, "
        f"{config.training.global_batch_rows:,} rows of {config.training.sequence_length:,} a step",
        soft_wrap=True,
    )
    if file is not None:
        write_atomically(file, (json.dumps(_as_json(config, found, cluster, tokens, stop_s), indent=1) + "\n").encode())
    if not found.best:
        console.print(
            "None fits; type more --gpus, a smaller training.sequence_length, or a training.global_batch_rows with "
            "more divisors.",
            soft_wrap=True,
        )
        return 1
    best = found.best[0]
    console.print(_layout_table(found, cluster, tokens, stop_s))
    for rank, candidate in enumerate(found.best[1:_SHOWN], 2):
        console.print(f"{rank}: {_why_slower(candidate, best)}", soft_wrap=True)
    for candidate in found.too_large[:3]:
        console.print(
            f"Too large: {_name(candidate)} would take {candidate.time.total_s:.2f} s a step, but "
            f"{candidate.peak_bytes / 2**30:.1f} GiB.",
            soft_wrap=True,
        )
    _show_best(console, config, best, cluster, tokens, stop_s)
    return 0


def show_figures(file: Path | None = None) -> int:
    """Print every published figure beside what is predicted with and without its model in the fit."""
    checks = check_figures()
    columns = ("model", "layers", "TP/CP/PP/VP", "GPUs", "step s", "fitted", "error %", "held out %")
    table = Table(*columns, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for check in checks:
        figure, layout = check.figure, check.figure.layout
        table.add_row(
            *(figure.model, str(figure.sizes.layers), f"{layout.tp}/{layout.cp}/{layout.pp}/{layout.vp}"),
            *(str(figure.gpus), f"{figure.step_s:.2f}", f"{check.predicted_s:.2f}"),
            *(f"{100 * check.error:+.1f}", f"{100 * check.held_out_error:+.1f}"),
        )
    console = Console()
    console.print(table)
    constants = ", ".join(f"{name} {value:.4f}" for name, value in asdict(FITTED).items())
    console.print(f"Constants of all figures: {constants}", soft_wrap=True)
    for model in dict.fromkeys(check.figure.model for check in checks):
        mean, worst = _errors([check for check in checks if check.figure.model == model])
        console.print(f"{model}, held out: mean error {mean:.1f}%, worst {worst:.1f}%", soft_wrap=True)
    mean, worst = _errors(checks)
    console.print(f"All {len(checks)}, held out by model: mean error {mean:.1f}%, worst {worst:.1f}%", soft_wrap=True)
    if file is not None:
        rows = [asdict(c) | {"error": c.error, "held_out_error": c.held_out_error} for c in checks]
        write_atomically(file, (json.dumps({"constants": asdict(FITTED), "figures": rows}, indent=1) + "\n").encode())
    return 0


def _errors(checks: list[Check]) -> tuple[float, float]:
    """Mean and worst error in per cent, held out."""
    errors = [100 * abs(check.held_out_error) for check in checks]
    return sum(errors) / len(errors), max(errors)


def _problems(
    config: RunConfig,
    cluster: Cluster,
    tokens: float,
    document_tokens: int | None,
    checkpoint_bytes_per_s: float | None,
) -> list[str]:
    problems = []
    if cluster.gpus < 1:
        problems.append(f"--gpus {cluster.gpus}: must be at least 1")
    if not cluster.memory_gib > 0:
        problems.append(f"--memory-gib {cluster.memory_gib:g}: must be over 0")
    if not tokens > 0:
        problems.append(f"--tokens {tokens:g}: must be over 0")
    length = config.training.sequence_length
    if document_tokens is not None and not 0 < document_tokens <= length:
        problems.append(f"--document-tokens {document_tokens}: must be 1 to training.sequence_length={length}")
    if checkpoint_bytes_per_s is not None and not checkpoint_bytes_per_s > 0:
        problems.append(f"--checkpoint-gb-per-s {checkpoint_bytes_per_s / 1e9:g}: must be over 0")
    return problems


def _layout_table(found: Found, cluster: Cluster, tokens: float, stop_s: float) -> Table:
    columns = ("", "TP", "CP", "PP", "VP", "DP", "rows", "recompute", "GiB", "bubble %", "step s", "MFU %", "days")
    table = Table(*columns, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify = "right"
    for rank, candidate in enumerate(found.best[:_SHOWN], 1):
        layout, time = candidate.layout, candidate.time
        table.add_row(
            *map(str, (rank, layout.tp, layout.cp, layout.pp, layout.vp, layout.dp, layout.micro_rows)),
            layout.recompute,
            f"{candidate.peak_bytes / 2**30:.1f}",
            f"{100 * time.bubble_s / time.total_s:.1f}",
            f"{time.total_s:.2f}",
            f"{100 * candidate.flops_utilisation(cluster.gpu):.1f}",
            f"{training_days(candidate, tokens, stop_s):.1f}",
        )
    return table


def _why_slower(candidate: Candidate, best: Candidate) -> str:
    """The parts that cost most against the best layout, and what it gains."""
    gap = candidate.time.total_s - best.time.total_s
    more = slower_by(candidate, best)
    named = [f"{_PARTS[part]} +{seconds:.2f} s" for part, seconds in list(more.items())[:2] if seconds > 0.1 * gap]
    part, gained = list(more.items())[-1]
    named += [f"{_PARTS[part]} {gained:.2f} s"] if gained < -0.1 * gap else []
    return f"{gap:+.2f} s a step ({', '.join(named)})"


def _show_best(
    console: Console, config: RunConfig, best: Candidate, cluster: Cluster, tokens: float, stop_s: float
) -> None:
    from stepaudio_train.training.plan_remedies import overrides_between

    time = best.time
    shares = {part: 100 * getattr(time, f"{part}_s") / time.total_s for part in _PARTS}
    named = [f"{_PARTS[part]} {share:.1f}%" for part, share in shares.items() if share >= 0.05]
    console.print(f"A step of the first: {', '.join(named)}.", soft_wrap=True)
    days = training_days(best, tokens, stop_s)
    console.print(f"{best.tokens_per_s * 86400:.3g} tokens a day, {days:.1f} days.", soft_wrap=True)
    if stop_s:
        training = config.training
        when = f"every {training.checkpoint_every} steps" if training.checkpoint_every else "only at the end"
        how = "behind the training" if training.async_checkpoint else "which the training waits for"
        console.print(f"A checkpoint takes {stop_s:.0f} s, {when}, {how}.", soft_wrap=True)
    published = best.as_published(cluster.gpu)
    utilisation = best.flops_utilisation(cluster.gpu) * time.total_s / published.total_s
    console.print(
        "With TP's communication beside the matmuls, CP's behind attention, cuDNN's attention and gradients reduced in "
        f"bf16, as the published runs have them: {published.total_s:.2f} s, MFU {100 * utilisation:.1f}%.",
        soft_wrap=True,
    )
    typed = [shlex.quote(override) for override in overrides_between(config, best.config)]
    console.print(f"For the first, type: {' '.join(typed) or 'nothing; it is what is typed'}", soft_wrap=True)


def _name(candidate: Candidate) -> str:
    layout = candidate.layout
    recompute = "" if layout.recompute == "none" else f", recompute {layout.recompute}"
    return f"TP {layout.tp}, CP {layout.cp}, PP {layout.pp}, VP {layout.vp}, {layout.micro_rows} row(s){recompute}"


def _as_json(config: RunConfig, found: Found, cluster: Cluster, tokens: float, stop_s: float) -> dict[str, Any]:
    from stepaudio_train.training.plan_remedies import overrides_between

    def row(candidate: Candidate) -> dict[str, Any]:
        return {
            "overrides": overrides_between(config, candidate.config),
            "layout": asdict(candidate.layout),
            "peak_bytes": candidate.peak_bytes,
            "step_s": candidate.time.total_s,
            "parts": {part.name: getattr(candidate.time, part.name) for part in fields(StepTime)},
            "mfu": candidate.flops_utilisation(cluster.gpu),
            "tokens_per_s": candidate.tokens_per_s,
            "days": training_days(candidate, tokens, stop_s),
        }

    return {
        "cluster": asdict(cluster),
        "tokens": tokens,
        "checkpoint_s": stop_s or None,
        "tried": found.tried,
        "best": [row(candidate) for candidate in found.best],
        "too_large": [row(candidate) for candidate in found.too_large],
    }
