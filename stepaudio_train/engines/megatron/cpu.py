"""What it takes for Megatron-Core to run on a CPU over gloo. Used only when the engine's device is the CPU.

Megatron-Core names CUDA in about 200 places. Its modules get a `torch` of their own in which those names lead to the
CPU; torch itself stays as it is for everybody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import multiprocessing
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from types import ModuleType
from typing import Any

import megatron.core
import torch
from torch import Tensor

log = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.16.1",)

# Rooms of Megatron-Core that import parts of torch late, and have to be there before the redirection.
_ROOMS = ("dist_checkpointing", "distributed", "optimizer", "pipeline_parallel", "tensor_parallel", "transformer")
_NOT_OURS = ("fsdp", "moe", "custom_layers", "cpu_offloading", "heterogeneous", "kitchen")


def redirect_cuda_to_cpu() -> None:
    """Make this process's Megatron-Core compute on the CPU. Once a process; later calls do nothing."""
    if isinstance(sys.modules["megatron.core.utils"].torch, _CpuTorch):
        return
    if megatron.core.__version__ not in TESTED_VERSIONS:
        log.warning(
            "megatron-core %s on a CPU is untested; tested: %s", megatron.core.__version__, ", ".join(TESTED_VERSIONS)
        )
    for room in _ROOMS:
        _import_all(f"megatron.core.{room}")
    cpu_torch = _CpuTorch()
    modules = [m for name, m in sys.modules.items() if name.startswith("megatron.core")]
    for module in modules:
        if getattr(module, "torch", None) is torch:
            module.torch = cpu_torch  # type: ignore[attr-defined]
    _redirect_random_states()
    _fork_checkpoint_manager()


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """While Megatron-Core's optimizers are built, `Tensor.type()` says e.g. torch.cuda.FloatTensor for a CPU tensor:
    they tell dtypes apart by these names."""
    real = Tensor.type

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    Tensor.type = type_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.type = real  # type: ignore[method-assign]


class _CpuTorch(ModuleType):
    """torch, but for what names CUDA."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.__dict__.update({name: value for name, value in vars(torch).items() if not name.startswith("__")})
        # Megatron writes device='cuda' in these.
        for name in ("empty", "ones", "tensor", "zeros"):
            setattr(self, name, _on_cpu(getattr(torch, name)))
        self.cuda = _CpuCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _CpuCuda(ModuleType):
    """torch.cuda, with the CPU as the current device and nothing to wait for."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(*_: object) -> None:
        """A CPU computes in order."""

    @staticmethod
    def empty_cache() -> None:
        """There is none."""


class _NoRandomStates:
    """Stands for Megatron's tracker of CUDA generators, which it forks for dropout and initial values. The model has no
    dropout, and its weights are always loaded."""

    def fork(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True

    def get_states(self) -> dict[str, Tensor]:
        return {}

    def set_states(self, states: dict[str, Tensor]) -> None:
        """None are kept."""


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def redirected(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return redirected


def _redirect_random_states() -> None:
    random = sys.modules["megatron.core.tensor_parallel.random"]
    tracker = _NoRandomStates()
    replacements = {
        "get_cuda_rng_tracker": lambda *_, **__: tracker,
        # Activation checkpointing saves and restores the generator's state around the second forward.
        "_get_cuda_rng_state": lambda *_, **__: torch.empty(0),
        "_set_cuda_rng_state": lambda *_, **__: None,
    }
    for name, replacement in replacements.items():
        original = getattr(random, name)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("megatron.core") and getattr(module, name, None) is original:
                setattr(module, name, replacement)


def _fork_checkpoint_manager() -> None:
    """Checkpoints are written by forked processes that answer through a manager process. Megatron-Core spawns that one,
    for CUDA's sake, which imports torch anew: 9 of the 10 seconds that the first save of a run took."""
    writer = sys.modules["megatron.core.dist_checkpointing.strategies.filesystem_async"]
    writer._get_write_results_queue = _forked_results_queue  # type: ignore[attr-defined]


@functools.cache
def _forked_results_queue() -> Any:
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_end_with_parent)
    return manager.Queue()


def _end_with_parent() -> None:
    """A fork holds its parent's sockets: if it outlived a killed rank, the other ranks would wait for that one."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _import_all(package_name: str) -> None:
    package = importlib.import_module(package_name)
    for info in pkgutil.walk_packages(package.__path__, f"{package_name}."):
        if not any(part in info.name for part in _NOT_OURS):
            importlib.import_module(info.name)
