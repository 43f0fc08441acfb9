"""Imports point one way through the rooms, and the configuration needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "stepaudio_train"

# A room may import from rooms of a lower level, and from itself.
LEVELS = {
    "config": 0,
    "audio": 1,
    "tokenizers": 2,
    "data": 3,
    "models": 4,
    "objectives": 4,
    "convert": 5,
    "engines": 6,
    "testing": 7,
    "training": 7,
    "rollout": 7,
    "evaluation": 8,
    "rlhf": 9,
    "commands": 10,
    "cli": 11,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def rooms_imported(source: str, package: str) -> set[str]:
    """Rooms of stepaudio_train that a module imports, at the top or inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            modules.add(base)
            modules |= {f"{base}.{alias.name}" for alias in node.names}
    parts = [module.split(".") for module in modules]
    return {part[1] for part in parts if part[0] == "stepaudio_train" and len(part) > 1 and part[1] in LEVELS}


def test_every_room_has_a_level():
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert names - {"__init__"} <= LEVELS.keys(), "a new room needs a level here and a line in docs/architecture.md"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    relative = path.relative_to(ROOT)
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    imported = rooms_imported(path.read_text(encoding="utf-8"), ".".join(relative.parent.parts)) - {room}
    wrong = {other for other in imported if LEVELS[other] >= LEVELS.get(room, -1)}
    assert not wrong, f"{relative} ({room}) must not import from {', '.join(sorted(wrong))}"


def test_only_tests_import_the_test_helpers():
    users = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] != "testing"
        and "testing" in rooms_imported(path.read_text(encoding="utf-8"), "stepaudio_train")
    ]
    assert users == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import stepaudio_train.data.batch", {"data"}),
        ("from stepaudio_train.engines.base import Engine", {"engines"}),
        ("from stepaudio_train import training", {"training"}),
        ("def f():\n    from ..rollout import x", {"rollout"}),
        ("from .other import x", {"data"}),
        ("import torch", set()),
    ],
)
def test_the_check_sees_every_form_of_import(source: str, found: set[str]):
    assert rooms_imported(source, "stepaudio_train.data") == found


def test_configuration_and_help_load_no_torch():
    rooms = [f"stepaudio_train.config.{path.stem}" for path in (PACKAGE / "config").glob("*.py")]
    program = (
        "import importlib, sys\n"
        f"for name in {rooms!r} + ['stepaudio_train.cli']:\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
