"""`stepaudio doctor`: is this machine ready, and what to type where it is not."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console

_TESTED_TORCH = ("2.11", "2.13")
_MIN_MEMORY_GIB = 4
_MIN_DISK_GIB = 5
_GLOO_PROBE = (
    "import datetime, torch, torch.distributed as dist; "
    "dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=30)); "
    "x = torch.ones(1); dist.all_reduce(x); dist.destroy_process_group(); raise SystemExit(x.item() != 2)"
)


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    subject: str
    state: Literal["ok", "note", "broken"]
    """note: works, but not as it could. broken: something of the project will not run."""
    fact: str
    advice: str = ""
    """What to type or do; empty when all is well."""


def examine(run_dir: Path) -> int:
    """Print every finding; exit status 1 if anything is broken."""
    console = Console(highlight=False)
    marks = {"ok": "[green]ok[/]    ", "note": "[yellow]note[/]  ", "broken": "[red]broken[/]"}
    broken = 0
    for check in checks(run_dir):
        finding = check()
        broken += finding.state == "broken"
        console.print(f"{marks[finding.state]} {finding.subject}: {finding.fact}", soft_wrap=True)
        if finding.advice:
            console.print(f"       -> {finding.advice}", soft_wrap=True)
    console.print("Ready." if not broken else f"{broken} thing(s) to mend.")
    return int(broken > 0)


def checks(run_dir: Path) -> list[Callable[[], Finding]]:
    """All checks, in the order they are told."""
    return [
        check_python,
        check_packages,
        check_torch,
        check_device,
        check_processor,
        check_memory,
        lambda: check_disk(run_dir),
        check_audio,
        check_gloo,
    ]


def check_python() -> Finding:
    fact = f"{platform.python_version()} on {platform.platform(terse=True)}"
    if sys.platform != "linux":
        return Finding("python", "broken", fact, "use Linux: data loading and the launcher rely on it")
    return Finding("python", "ok", fact)


def check_packages() -> Finding:
    """Installed versions against what the installed project asks for."""
    wrong, count = [], 0
    for line in metadata.requires("stepaudio-train") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        return Finding("packages", "broken", "; ".join(wrong), "rm -f .venv/.installed && make setup")
    return Finding("packages", "ok", f"{count} requirements are met")


def check_torch() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return Finding("torch", "broken", f"does not import: {error}", "make clean setup")
    version = Version(torch.__version__)
    if f"{version.major}.{version.minor}" not in _TESTED_TORCH:
        return Finding("torch", "note", f"{version}, tested are {' and '.join(_TESTED_TORCH)}", "make test")
    return Finding("torch", "ok", str(version))


def check_device() -> Finding:
    import torch

    if not torch.cuda.is_available():
        fact = f"none for torch {torch.__version__}; everything runs on the CPU"
        if shutil.which("nvidia-smi"):
            return Finding("GPU", "note", fact, "this torch has no CUDA: install one that has, then make clean setup")
        return Finding("GPU", "ok", fact)
    count = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(0)
    fact = f"{count} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB each"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("GPU", "note", f"{fact}, without bf16", "engine.precision=fp32")
    return Finding("GPU", "ok", f"{fact}, with bf16; use --nproc {count}")


def check_processor() -> Finding:
    import torch

    from stepaudio_train.engines.precision import choose_dtype

    cores = len(os.sched_getaffinity(0))
    native = choose_dtype("auto", torch.device("cpu")) is torch.bfloat16
    fact = f"{cores} core(s), {'bf16 in hardware' if native else 'no bf16 in hardware: engine.precision=auto is fp32'}"
    if cores < 2:
        return Finding("processor", "note", fact, "make quickstart is timed for 2 cores")
    return Finding("processor", "ok", fact)


def check_memory() -> Finding:
    free_gib = psutil.virtual_memory().available / 2**30
    fact = f"{free_gib:.1f} GiB free"
    if free_gib < _MIN_MEMORY_GIB:
        return Finding("memory", "note", fact, "close something: a few processes of torch may not fit")
    return Finding("memory", "ok", fact)


def check_disk(run_dir: Path) -> Finding:
    """Whether `run_dir`, or the folder it would be made in, can be written, and has room."""
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"x")
    except OSError as error:
        return Finding("run directory", "broken", f"{place}: {error.strerror}", "stepaudio doctor --run-dir ELSEWHERE")
    free_gib = shutil.disk_usage(place).free / 2**30
    fact = f"{run_dir} can be written, {free_gib:.0f} GiB free"
    if free_gib < _MIN_DISK_GIB:
        return Finding("run directory", "note", fact, f"free {_MIN_DISK_GIB} GiB, or type run_dir= on another disk")
    return Finding("run directory", "ok", fact)


def check_audio() -> Finding:
    try:
        soundfile = importlib.import_module("soundfile")
    except (ImportError, OSError) as error:
        return Finding("audio files", "broken", f"soundfile does not import: {error}", "make clean setup")
    return Finding("audio files", "ok", f"libsndfile {soundfile.__libsndfile_version__}")


def check_gloo() -> Finding:
    """Two processes add two numbers, as every CPU run with --nproc does."""
    from stepaudio_train.commands.run import run_ranks

    status = run_ranks([sys.executable, "-c", _GLOO_PROBE], 2)
    if status:
        advice = "export GLOO_SOCKET_IFNAME=INTERFACE, one that `ip addr` lists"
        return Finding("processes", "broken", f"two over gloo failed with status {status}", advice)
    return Finding("processes", "ok", "two talk over gloo")
