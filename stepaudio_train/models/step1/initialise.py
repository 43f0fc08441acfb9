"""Initial weights that depend on the seed and a tensor's name alone: the same for every engine and layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.models.step1.weight_map import VALUE_HEAD, hf_shapes


class InitialWeights(Mapping[str, Tensor]):
    """Hugging Face name -> full fp32 CPU tensor, drawn when asked for.

    Norms are one, a value head is zero. The rest is normal with `init_std`, smaller by sqrt(2 * layers) for what is
    added to the residual.
    """

    def __init__(self, config: Step1Config, seed: int) -> None:
        self._config, self._seed = config, seed
        self._shapes = hf_shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name in VALUE_HEAD:
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        std = self._config.init_std
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self._config.num_hidden_layers)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
