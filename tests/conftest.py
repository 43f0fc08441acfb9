"""What every test gets: few threads, no calls home, and GPU tests only where there is a GPU."""

import os
import tempfile
from pathlib import Path

import pytest

# Before any test imports torch: the suite starts processes of its own, and two cores do not bear threads of each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
# Before any test imports triton: without an NVIDIA driver its kernels run in its interpreter, on the CPU.
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Where transformers copies the code of exported directories to before it runs it.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules."))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
