"""Where configs/ and recipes/ lie: in the repository, or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_dir() -> Path:
    """Folder of the YAML files that Hydra composes."""
    return _folder("configs")


def recipes_dir() -> Path:
    """Folder of the programs that `stepaudio run` starts."""
    return _folder("recipes")


def _folder(name: str) -> Path:
    candidates = (_PACKAGE.parent / name, _PACKAGE / f"_{name}")
    # A wheel's neighbour in site-packages may bear the same name, so the repository is known by its pyproject.toml.
    for folder in candidates if (_PACKAGE.parent / "pyproject.toml").is_file() else candidates[1:]:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no {name}/ in {_PACKAGE.parent} nor {candidates[1]}; install stepaudio-train again")
