"""Low-rank adapters on Step-1 through PEFT: which matrices get one, their first values, merging, the PEFT directory.

Adapters bear the names that PEFT gives them in a file: base_model.model.<layer>.lora_A.weight and lora_B.weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stepaudio_train.config.schema import LoraConfig, Step1Config
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import hf_shapes

_PREFIX = "base_model.model."
_ADAPTER = "default"
_WEIGHTS_FILE = "adapter_model.safetensors"


def add_adapters(model: Step1ForCausalLM, lora: LoraConfig) -> None:
    """Put an adapter on every target matrix of `model`, in place; nothing else but a value head is trained from then
    on."""
    # PEFT takes seconds to import, and runs without adapters need none of it.
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_peft_config(lora), model)
    if model.value_head is not None:
        model.value_head.requires_grad_(True)


@contextmanager
def adapters_off(model: Step1ForCausalLM) -> Iterator[None]:
    """While it lasts, `model` computes what it would without its adapters."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    # Scaled to nothing, not taken out: DeepSpeed fetches weights in the order in which modules were once called.
    for layer in layers:
        layer.set_scale(_ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_ADAPTER, 1.0)


def adapter_shapes(config: Step1Config, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Adapter name -> shape, in the order of the forward: A [rank, in], then B [out, rank] of each target."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in hf_shapes(config).items():
        if name.split(".")[-2] in lora.targets:
            a, b = adapter_names(name)
            shapes[a], shapes[b] = (lora.rank, shape[1]), (shape[0], lora.rank)
    return shapes


def adapter_names(name: str) -> tuple[str, str]:
    """Names of the two adapter matrices, A and B, of the Hugging Face weight `name`."""
    layer = name.removesuffix(".weight")
    return f"{_PREFIX}{layer}.lora_A.weight", f"{_PREFIX}{layer}.lora_B.weight"


def adapter_parameters(model: Step1ForCausalLM) -> dict[str, nn.Parameter]:
    """Adapter name -> parameter of a model that `add_adapters` changed."""
    return {adapter_name(name): p for name, p in model.named_parameters() if adapter_name(name) != name}


def adapter_name(parameter: str) -> str:
    """The adapter's name of a parameter's name in the module; other parameters keep theirs."""
    is_adapter = ".lora_A." in parameter or ".lora_B." in parameter
    return _PREFIX + parameter.replace(f".{_ADAPTER}.weight", ".weight") if is_adapter else parameter


def base_parameters(model: Step1ForCausalLM) -> dict[str, nn.Parameter]:
    """Hugging Face name -> parameter, adapters left out, of a model with or without them."""
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if adapter_name(name) == name}


def initial_adapter(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """First value, fp32 on the CPU, by the seed and the name alone: the same on every engine and layout.

    B is zero, so that the adapted model begins as the base model. A is uniform within 1 / sqrt(in), as PEFT's.
    """
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merged(base: Tensor, a: Tensor, b: Tensor, lora: LoraConfig) -> Tensor:
    """The plain fp32 weight [out, in] that computes what `base` with adapter a [rank, in], b [out, rank] does."""
    return base.float() + (lora.alpha / lora.rank) * (b.float() @ a.float())


def write_adapters(directory: Path, adapters: Mapping[str, Tensor], lora: LoraConfig, base: str | None) -> None:
    """Write what `peft.PeftModel.from_pretrained(model, directory)` reads: adapter_config.json and
    adapter_model.safetensors.

    Args:
        adapters: every adapter by name.
        base: where the adapted model lies; noted in the configuration for its readers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = _peft_config(lora, base_model_name_or_path=base, task_type="CAUSAL_LM", inference_mode=True)
    config.save_pretrained(str(directory))
    tensors = {name: tensor.contiguous() for name, tensor in adapters.items()}
    save_file(tensors, directory / _WEIGHTS_FILE, metadata={"format": "pt"})


def _peft_config(lora: LoraConfig, **more: Any) -> Any:
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=sorted(lora.targets), **more)
