"""Single modules of the packages that tests and benchmarks compare with (tests/reference-packages.txt)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType


def has_reference(package: str) -> bool:
    """Whether `make setup` has installed it."""
    return importlib.util.find_spec(package) is not None


def reference_module(name: str) -> ModuleType:
    """A module such as `funasr.models.scama.encoder`, without what its package imports beside it.

    The packages' own `__init__` would import all of their modules, and with them libraries that are not installed. A
    module `torchaudio` that holds nothing stands in where that is not installed: no function that is compared uses it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = name.split(".")[0]
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"{package} is not installed; type: make setup")
        bare = ModuleType(package)
        bare.__path__, bare.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules[package] = bare
    stands_in = importlib.util.find_spec("torchaudio") is None
    if stands_in:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        return importlib.import_module(name)
    finally:
        if stands_in:
            del sys.modules["torchaudio"]
