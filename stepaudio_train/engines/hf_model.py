"""What the engines on the plain PyTorch model share (`local` and `deepspeed`): its parameters by name, their groups,
their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from stepaudio_train.config.schema import LoraConfig, OptimizerConfig, RunConfig
from stepaudio_train.models.step1.lora import adapter_names, adapter_shapes, base_parameters, initial_adapter, merged
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import hf_shapes

OTHER_ADAPTERS = (
    "{directory}: holds other adapters than this run trains, or none where it trains some; go on with the same lora.* "
    "settings, or start another run from the merged weights with model.init=RUN_DIR/export"
)
"""Message of a checkpoint that does not fit `lora`."""


def optimizer_groups(model: Step1ForCausalLM, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained: matrices; norms and a bias, without weight decay; embedding and head, with
    their own learning rate. A group has its `learning_rate_multiplier` and `weight_decay`; empty ones are left out."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    trained = {name: p for name, p in base_parameters(model).items() if p.requires_grad}
    embeddings = [trained[name] for name in names if name in trained]
    chosen = {id(p) for p in embeddings}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    # ZeRO has emptied the tensors that it cut up, and keeps what they were elsewhere; vectors are known by their names.
    vectors = {id(p) for name, p in trained.items() if name.endswith(("norm.weight", ".bias"))}
    decay, multiplier = config.weight_decay, config.embedding_learning_rate_multiplier
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if id(p) not in vectors], "learning_rate_multiplier": 1.0, "weight_decay": decay},
        {"params": [p for p in rest if id(p) in vectors], "learning_rate_multiplier": 1.0, "weight_decay": 0.0},
        {"params": embeddings, "learning_rate_multiplier": multiplier, "weight_decay": decay},
    ]
    return [group for group in groups if group["params"]]


def adamw_options(config: OptimizerConfig) -> dict[str, Any]:
    """What all groups share, as torch.optim.AdamW takes it."""
    return {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}


def merged_weights(
    config: RunConfig,
    base: Mapping[str, nn.Parameter],
    adapters: Mapping[str, nn.Parameter],
    full: Callable[[nn.Parameter], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor), adapters merged in; one at a time.

    Args:
        base: Hugging Face name -> parameter.
        adapters: adapter name -> parameter; empty without adapters.
        full: the whole fp32 value of a parameter, a copy.
    """
    for name in hf_shapes(config.model):
        value = full(base[name])
        a, b = adapter_names(name)
        if config.lora is not None and a in adapters:
            value = merged(value, full(adapters[a]), full(adapters[b]), config.lora)
        yield name, value


def initial_adapters(config: RunConfig, lora: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (adapter name, first value)."""
    for name, shape in adapter_shapes(config.model, lora).items():
        yield name, initial_adapter(name, shape, config.training.seed)
