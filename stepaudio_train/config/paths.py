"""Where things lie: configs/ and recipes/ in the repository or an installed wheel, checkpoints in a run."""

from __future__ import annotations

import json
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_dir() -> Path:
    """Folder of the YAML files that Hydra composes."""
    return _folder("configs")


def recipes_dir() -> Path:
    """Folder of the programs that `stepaudio run` starts."""
    return _folder("recipes")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints/`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and p.suffix != ".partial")


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's `checkpoints/`."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def result_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in a run's `checkpoints/` whose weights are the run's: the best one with training.early_stop, the
    newest otherwise."""
    newest = latest_checkpoint(folder)
    if newest is None:
        return None
    best = json.loads((newest / "state.json").read_text(encoding="utf-8")).get("best")
    return newest if best is None else folder / f"step_{best['step']:08d}"


def _folder(name: str) -> Path:
    candidates = (_PACKAGE.parent / name, _PACKAGE / f"_{name}")
    # A wheel's neighbour in site-packages may bear the same name, so the repository is known by its pyproject.toml.
    for folder in candidates if (_PACKAGE.parent / "pyproject.toml").is_file() else candidates[1:]:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no {name}/ in {_PACKAGE.parent} nor {candidates[1]}; install stepaudio-train again")
