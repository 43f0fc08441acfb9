"""Training tokens/s of a model in every engine and layout, against the same model in a plain transformers Trainer loop.

    .venv/bin/python benchmarks/training.py [--steps 20] [--json FILE] [KEY=VALUE ...]

Every row is the real command in processes of its own, one after the other, on the same made-up rows from the same
initial weights: the losses have to agree, or the comparison means nothing. Tokens/s is the median over the steps
after the first five.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reporting import parser, report

_WARMUP_STEPS = 5
_LOSS_TOLERANCE = 1e-2
"""Relative, at the last step: rounding differs between layouts, and grows."""
_LAUNCH = (
    "import sys; from stepaudio_train.commands.run import run_ranks; "
    "sys.exit(run_ranks([sys.executable, *sys.argv[2:]], int(sys.argv[1])))"
)


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    processes: int
    overrides: tuple[str, ...] | None
    """Of the project's recipe; None for the Trainer."""


CONTENDERS = (
    Contender("transformers Trainer", 1, None),
    Contender("transformers Trainer, DDP", 2, None),
    Contender("local", 1, ("engine=local",)),
    Contender("megatron", 1, ("engine=megatron",)),
    Contender("megatron DP=2", 2, ("engine=megatron",)),
    Contender("megatron TP=2", 2, ("engine=megatron", "engine.tensor_parallel=2")),
    Contender("megatron CP=2", 2, ("engine=megatron", "engine.context_parallel=2")),
    Contender("megatron PP=2", 2, ("engine=megatron", "engine.pipeline_parallel=2")),
)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=20, help="optimizer steps of every run")
    options.add_argument("--only", nargs="+", metavar="NAME", help="rows whose names hold one of these words")
    options.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to experiment=debug for all rows")
    chosen = options.parse_intermixed_args()
    # Trainer counts the steps of a warmup differently, and both sides must take the same ones.
    settings = (f"training.max_steps={chosen.steps}", "training.export_hf=false", "optimizer.warmup_steps=0")
    shared = ["experiment=debug", *settings, *chosen.overrides]
    if chosen.steps <= _WARMUP_STEPS:
        options.error(f"--steps must be over {_WARMUP_STEPS}")
    contenders = [c for c in CONTENDERS if not chosen.only or any(word in c.name for word in chosen.only)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, contender in enumerate(contenders):
            print(f"{contender.name} ({contender.processes} process(es)) ...", file=sys.stderr, flush=True)
            speeds, losses = _measure(contender, shared, Path(folder, str(number)))
            rows.append(
                {
                    "engine": contender.name,
                    "processes": contender.processes,
                    "tokens/s": statistics.median(speeds[_WARMUP_STEPS:]),
                    "against the first": statistics.median(speeds[_WARMUP_STEPS:])
                    / (rows[0]["tokens/s"] if rows else 1),
                    "first loss": losses[0],
                    "last loss": losses[-1],
                }
            )
    rows[0]["against the first"] = 1.0
    report(f"Training, {' '.join(shared)}", rows, chosen.json)
    for row in rows[1:]:
        for when in ("first loss", "last loss"):
            if abs(row[when] / rows[0][when] - 1) > _LOSS_TOLERANCE:
                raise SystemExit(f"{row['engine']} and {rows[0]['engine']} do not compute the same: see {when}")


def _measure(contender: Contender, shared: Sequence[str], folder: Path) -> tuple[list[float], list[float]]:
    """Tokens/s and loss of every step; the Trainer tells no speed for its first."""
    if contender.overrides is None:
        results = folder.with_suffix(".json")
        baseline = Path(__file__).with_name("trainer_baseline.py")
        _run([sys.executable, "-c", _LAUNCH, str(contender.processes), str(baseline), str(results), *shared])
        found = json.loads(results.read_text(encoding="utf-8"))
        return found["tokens_per_s"][:1] + found["tokens_per_s"], found["loss"]
    command = [sys.executable, "-m", "stepaudio_train.cli", "run", "pretrain", *shared, *contender.overrides]
    quiet = ["logging.tensorboard=false", "logging.wandb=disabled", "logging.progress_bar=false"]
    _run([*command, *quiet, f"run_dir={folder}", "--nproc", str(contender.processes)])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [step["tokens_per_s"] for step in steps], [step["loss"] for step in steps]


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stdout}")


if __name__ == "__main__":
    main()
