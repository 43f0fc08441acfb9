"""Single modules of the packages that tests and benchmarks compare with (tests/reference-packages.txt)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

from stepaudio_train.config.tokenizer import LinguisticConfig


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


def funasr_encoder(config: LinguisticConfig) -> nn.Module:
    """FunASR's streaming encoder of these sizes, untrained.

    Raises:
        ModuleNotFoundError: FunASR is not installed.
    """
    encoder: nn.Module = reference_module("funasr.models.scama.encoder").SANMEncoderChunkOpt(
        input_size=config.input_size,
        output_size=config.hidden_size,
        attention_heads=config.num_heads,
        linear_units=config.ffn_size,
        num_blocks=config.num_blocks,
        input_layer="pe_online",
        normalize_before=True,
        kernel_size=config.kernel_size,
        sanm_shfit=0,
        selfattention_layer_type="sanm",
        chunk_size=[12, 15],
        stride=[8, 10],
        pad_left=[0, 0],
        encoder_att_look_back_factor=[4, 4],
        decoder_att_look_back_factor=[1, 1],
    )
    return encoder.eval()


def funasr_cache(config: LinguisticConfig) -> dict[str, Any]:
    """What `forward_chunk` of `funasr_encoder` is given before the first chunk, as StepFun's code gives it."""
    return {
        "start_idx": 0,
        "chunk_size": [0, config.chunk_frames, config.overlap_frames],
        "encoder_chunk_look_back": config.look_back_chunks,
        "opt": None,
        "feats": torch.zeros(1, config.overlap_frames, config.input_size),
        "tail_chunk": False,
    }
