"""LoRA adapters, as peft saves them, merged into the weights they were trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from stepaudio_train.convert.sources import WeightReader
from stepaudio_train.convert.tensor_files import StoredTensor, WeightError, read_safetensors_header
from stepaudio_train.models.step1.weight_map import Entry

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What changes the product W + scale * B A, and is not done here.
_UNSUPPORTED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out")


class MergedAdapters:
    """Weights with adapters added: W + alpha / rank * B @ A, in fp32, rounded once to the dtype of W."""

    def __init__(self, reader: WeightReader, directory: Path) -> None:
        """
        Raises:
            WeightError: the folder holds no adapters, or some that cannot be merged into Step-1.
        """
        self._reader, self.dtype = reader, reader.dtype
        self._directory = directory
        self._scale = _read_scale(directory)
        self._pairs = _read_pairs(directory)

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of one entry."""
        return {name: self._merged(name, weight) for name, weight in self._reader.read(entry).items()}

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._pairs:
            return weight
        a, b = (stored.read().float() for stored in self._pairs[name])
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise WeightError(
                f"{self._directory}: adapters {list(b.shape)} x {list(a.shape)} do not fit {name} "
                f"{list(weight.shape)}; give the model they were trained on"
            )
        return (weight.float() + self._scale * (b @ a)).to(weight.dtype)


def _read_scale(directory: Path) -> float:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise WeightError(f"{directory}: holds no {CONFIG_FILE}; give a folder of adapters, such as RUN/adapters")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise WeightError(f"{path}: peft_type={config.get('peft_type')}; only LORA can be merged")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if used:
        raise WeightError(f"{path}: uses {', '.join(used)}, which cannot be merged here; merge it with peft")
    rank, alpha = config["r"], config["lora_alpha"]
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _read_pairs(directory: Path) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Hugging Face name of a weight -> its A and B."""
    stored = read_safetensors_header(directory / WEIGHTS_FILE)
    pairs = {}
    for key, a in stored.items():
        module, found, _ = key.removeprefix(_PREFIX).partition(".lora_A.")
        if not found:
            continue
        other = key.replace(".lora_A.", ".lora_B.")
        if other not in stored:
            raise WeightError(f"{directory / WEIGHTS_FILE}: has {key} without {other}")
        pairs[f"{module}.weight"] = (a, stored[other])
    if not pairs or 2 * len(pairs) != len(stored):
        raise WeightError(f"{directory / WEIGHTS_FILE}: holds other tensors than pairs of lora_A and lora_B")
    return pairs
