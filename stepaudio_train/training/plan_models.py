"""What `stepaudio plan` counts of the models around a policy that learns from rewards."""

from __future__ import annotations

from dataclasses import replace

from stepaudio_train.config.policy_runs import PolicyRunConfig, PpoRunConfig
from stepaudio_train.models.step1.weight_map import num_parameters
from stepaudio_train.training.plan_states import States, base_elements, compute_bytes, rank_states


def companion_states(config: PolicyRunConfig, stage: int, world_size: int) -> States:
    """Bytes of one rank of a pipeline stage, all models together, each taken to be as large as the policy, since no
    file is looked at. A rank of the policy, where reference and reward model have their own (`judge_ranks`).

    An own critic has all that a trained model has. A reference, which adapters need not, and a reward model have their
    weights alone, the model that draws answers too: whole, on the first rank of a replica, which is of the first stage.
    """
    weights = gradients = optimizer = buffers = host = 0
    if isinstance(config, PpoRunConfig) and config.critic.kind == "own":
        critic = rank_states(config, stage, world_size)
        weights, gradients, optimizer = critic.weights, critic.gradients, critic.optimizer
        buffers, host = critic.buffers, critic.host
    judges = 0 if config.judge_ranks else config.has_reference + (config.reward.model is not None)
    judge = _judge_bytes(config, stage, world_size)
    if config.engine.offload == "all":
        host += judges * judge
    else:
        weights += judges * judge
    if stage == 0 and config.rollout.server is None:
        weights += _rollout_bytes(config)
    return States(weights, gradients, optimizer, buffers, host)


def _judge_bytes(config: PolicyRunConfig, stage: int, world_size: int) -> int:
    """`local` computes with casts of fp32 weights; ZeRO-3 alone cuts weights."""
    size = 4 if config.engine.name == "local" else compute_bytes(config)
    cut = world_size if config.engine.name == "deepspeed" and config.engine.zero_stage == 3 else 1
    return size * -(-base_elements(config, stage) // cut)


def _rollout_bytes(config: PolicyRunConfig) -> int:
    sizes = {"auto": compute_bytes(config), "bf16": 2, "fp32": 4}
    return sizes[config.rollout.dtype] * num_parameters(replace(config.model, value_head=False))
