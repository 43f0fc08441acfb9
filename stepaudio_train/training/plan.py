"""Memory that a run needs on each rank, from its configuration alone.

Counted, in bytes a rank (p: parameters it holds; t: those that are trained, adapters alone with LoRA; dp:
ranks that hold the same weights, which are DP times CP, and for DeepSpeed all). Read out of the engines, and checked by
benchmarks/memory.py.

    weights     local 4p; with adapters 2p (bf16) or 4p for what stays as it is, and 4t. megatron bf16 2p, fp32 4p.
                deepspeed 2p or 4p, adapters too; ZeRO-3 that / dp
    gradients   4t: they are added up in fp32 whatever the weights are. ZeRO-2 and 3: 4t / dp. ZeRO-1 in bf16: 2t of the
                backward beside them
    optimizer   Adam's two moments 8t, and the fp32 master weights 4t of megatron in bf16 and of deepspeed (but fp32
                ZeRO-3, whose weights are their own); / dp with the distributed optimizer, and always with deepspeed.
                The accounting of Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), gradients in fp32
    buffers     deepspeed's. ZeRO-1 and 2: buckets that gradients are reduced from (two on a GPU, to overlap), allocated
                whole, and in bf16 ZeRO-2 what is in one of them in fp32; bf16 ZeRO-1 reduces where they are. ZeRO-3:
                one bucket in fp32, the copy that is cut up, and gathered weights: what comes again within 1e9
                parameters (stage3_max_reuse_distance), 5e8 before the loss and after it, and what is fetched ahead. A
                tensor over the bucket's size is reduced by itself
    host        with offload: masters and moments 12t / dp, gradients 4t / dp (ZeRO-3: twice), ZeRO-2's weights on
                their way back, and with `all` the weights
    activations what the fullest moment of a step needs on top: at the loss, at the end of the backward, or in the
                update. At the loss these are, per token and layer (h: hidden, k: key/value width, i: inner width, t:
                TP): the two norms' inputs and outputs 4h/t, queries, keys and values (h + 2k)/t, the attention's output
                h/t, gate, up and their product 3i/t; times the bytes of the compute type. This is the accounting of
                Korthikanti et al. 2022 (arXiv 2205.05198) with sequence parallelism, without dropout and without
                stored attention scores. What is not fused is kept too: silu(gate) i/t but for megatron on a GPU, and
                on a CPU the norms' inner results and the attention's joined documents. Autocast keeps the residual
                stream in fp32, casts anew for every matrix, and has bf16 copies of all weights until the backward.
                Adapters take the layers' activations as they are, and their own of `rank` numbers.
                Full recomputation keeps each layer's input h/t (`offload`: in host memory) and one layer's activations.
                Under context parallelism a rank has its share of the tokens, and keys and values of all: 2k/t more.
                Times the micro-batches in flight: pp - stage under 1F1B, and (2(pp - stage - 1) + (vp - 1)pp + 1) / vp
                under the interleaved schedule, but no more than there are.
                With them the head (last stage): its input; a slice of the logits in fp32, and all of them in the
                compute type where that is no more than 256 MiB; the head's gradient as it is made, in fp32, where it is
                trained (models/step1/vocab_parallel.py). Gradients that are not there at the step's first loss are not
                counted twice
    models      of PPO and GRPO: critic, reference, reward model and the one that draws answers (plan_models.py), less
                those that judge_ranks places elsewhere: the ranks planned are the policy's. They
                compute one after the other, so activations are the policy's. How many micro-batches a step has follows
                from the answers; planned as if each had a row of its own, which is the most
    runtime     an assumed 2 GiB on a GPU for the CUDA context, NCCL's buffers and fragmentation

Not counted: host memory while a model is built (local, ZeRO-1 and 2: 4p in every process, before it goes to the GPU),
what oneDNN takes on a CPU, checkpoints while they are written, keys and values of the answers that PPO and GRPO draw at
once.

`engine.device=auto` is planned as a GPU, since one plans on another machine than one trains on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from stepaudio_train.config.checks import data_parallel_size
from stepaudio_train.config.policy_runs import PolicyRunConfig
from stepaudio_train.config.schema import RunConfig
from stepaudio_train.models.step1.weight_map import num_parameters
from stepaudio_train.training.plan_activations import activation_bytes, offloaded_bytes
from stepaudio_train.training.plan_models import companion_states
from stepaudio_train.training.plan_states import States, base_elements, rank_states

_RUNTIME_BYTES = 2 * 2**30
# A search plans hundreds of layouts of one model.
_num_parameters = lru_cache(maxsize=8)(num_parameters)


@dataclass(frozen=True)
class StagePlan:
    """Bytes that each rank of one pipeline stage needs."""

    stage: int
    parameters: int
    """Held by one rank, vocabulary padding included."""
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """DeepSpeed's: gathered weights, buckets of gradients and what they are reduced in."""
    activations: int
    models: int
    """Of those around a policy that learns from rewards, all that they hold."""
    runtime: int
    host: int
    """In the machine's own memory, not the device's."""

    @property
    def total(self) -> int:
        """On the device."""
        states = self.weights + self.gradients + self.optimizer + self.buffers
        return states + self.activations + self.models + self.runtime


@dataclass(frozen=True)
class RunPlan:
    """A run's layout and the memory of its ranks."""

    parameters: int
    """Of the whole model, without padding."""
    world_size: int
    data_parallel: int
    micro_batches: int
    """A step, on one data-parallel rank."""
    stages: tuple[StagePlan, ...]

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.total for stage in self.stages)

    @property
    def host(self) -> int:
        """Bytes of host memory of the rank that needs most of it."""
        return max(stage.host for stage in self.stages)


def plan_run(config: RunConfig, world_size: int) -> RunPlan:
    """Memory of every pipeline stage of `config` over `world_size` ranks. The layout must be valid."""
    dp = data_parallel_size(config, world_size)
    micro_batches = -(-_rows(config) // (dp * config.training.micro_batch_rows))
    stages = range(config.engine.pipeline_parallel)
    plans = tuple(_plan_stage(config, stage, world_size, micro_batches) for stage in stages)
    return RunPlan(_num_parameters(config.model), world_size, dp, micro_batches, plans)


def _rows(config: RunConfig) -> int:
    """Of a step, over all data-parallel ranks; those of answers at the most."""
    if isinstance(config, PolicyRunConfig):
        return config.answers_per_iteration // config.training.minibatches
    return config.training.global_batch_rows


def _plan_stage(config: RunConfig, stage: int, world_size: int, micro_batches: int) -> StagePlan:
    states, others = rank_states(config, stage, world_size), States(0, 0, 0)
    if isinstance(config, PolicyRunConfig):
        others = companion_states(config, stage, world_size)
    return StagePlan(
        stage=stage,
        parameters=base_elements(config, stage),
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        buffers=states.buffers,
        activations=activation_bytes(config, stage, micro_batches, states),
        models=others.weights + others.gradients + others.optimizer + others.buffers,
        runtime=0 if config.engine.device == "cpu" else _RUNTIME_BYTES,
        host=states.host + others.host + offloaded_bytes(config, stage, micro_batches),
    )
