"""Rules of the house that a program can check: declared dependencies, safe loading, files a person can read."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("stepaudio_train", "recipes", "data_tools", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 500
OWN = {*FOLDERS, "tests"}


# Loaded by name by another dependency: torch.utils.tensorboard.
LOADED_BY_OTHERS = {"tensorboard"}
# Folders that may import what an extra of pyproject.toml brings.
EXTRAS = {
    "benchmarks": ["dev"],
    "stepaudio_train/engines/deepspeed": ["deepspeed"],
    "stepaudio_train/evaluation/speech_judges.py": ["judges"],
    "stepaudio_train/models/step1/kernels": ["kernels"],
    "stepaudio_train/models/step1/fused.py": ["gpu"],
    "stepaudio_train/testing/triton_interpreter.py": ["kernels"],
    "stepaudio_train/data/recording_jobs.py": ["datasets"],
    "stepaudio_train/data/tokenize_workers.py": ["ray"],
}
PROVIDERS = metadata.packages_distributions()


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """What the installed project asks for, in all and for `extras`."""
    requirements = [Requirement(line) for line in metadata.requires("stepaudio-train") or []]
    return {
        normalised(r.name)
        for r in requirements
        if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    }


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    neighbours = {neighbour.stem for neighbour in path.parent.glob("*.py")}
    return found - OWN - neighbours - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_declared(path: Path):
    extras = [extra for place, names in EXTRAS.items() if path.is_relative_to(ROOT / place) for extra in names]
    allowed = declared(*extras)
    # Namespace packages such as megatron have several providers; one declared is enough.
    missing = {
        module
        for module in imported(path)
        if not {normalised(provider) for provider in PROVIDERS.get(module, [])} & allowed
    }
    assert not missing, f"declare what provides {', '.join(sorted(missing))} in pyproject.toml, then make setup"


def test_core_dependencies_have_a_user():
    used = {normalised(p) for path in FILES for module in imported(path) for p in PROVIDERS.get(module, [])}
    assert declared() - used - LOADED_BY_OTHERS == set(), "no code imports these; take them out of pyproject.toml"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_load_nothing_unsafe(path: Path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_LINES, "split it"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if ast.unparse(node.func) == "torch.load":
            assert options.get("weights_only") == "True", f"line {node.lineno}: torch.load without weights_only=True"
        assert "trust_remote_code" not in options, f"line {node.lineno}: runs foreign code"


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 200
