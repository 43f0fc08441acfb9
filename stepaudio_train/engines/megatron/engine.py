"""Megatron-Core behind the engine contract: tensor, sequence, context, pipeline and data parallelism, on GPUs and on
CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from stepaudio_train.config.schema import RunConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.engines.base import Engine, NonFiniteError, StepResult, T, blank_outputs, loss_of_all
from stepaudio_train.engines.megatron import weights as weight_exchange
from stepaudio_train.engines.megatron.adamw import AdamW
from stepaudio_train.engines.megatron.checkpoint import CheckpointIO
from stepaudio_train.engines.megatron.cpu import redirect_cuda_to_cpu
from stepaudio_train.engines.megatron.settings import ddp_config, transformer_config
from stepaudio_train.engines.precision import choose_dtype
from stepaudio_train.engines.process_group import join_process_group, own_device
from stepaudio_train.models.step1.fused import fuse, liger_parts
from stepaudio_train.models.step1.megatron_spec import BiasCache, Step1MegatronModel
from stepaudio_train.models.step1.weight_map import num_parameters
from stepaudio_train.objectives.base import Objective, ObjectiveOutput, TokenOutputs, needs_entropies

_LossFunction = Callable[[TokenOutputs, TokenBatch], tuple[Tensor, Tensor, Tensor]]
"""Loss sum, Megatron's integer count of tokens, which it divides by unless it is zero, and what to keep."""


class MegatronEngine(Engine):
    """Joins the process group that torchrun's environment variables describe, and builds this rank's part.

    Several engines of one process share the layout of the first, which is closed last.
    """

    def __init__(self, config: RunConfig, trained: bool = True) -> None:
        """
        Args:
            trained: False: there are neither gradients nor an optimizer, and the engine is a `Judge` alone.
        """
        self.config, self._trained = config, trained
        self.device = own_device(config.engine.device)
        self._dtype = choose_dtype(config.engine.precision, self.device)
        self._owns_process_group = join_process_group(self.device)
        if self.device.type == "cpu":
            redirect_cuda_to_cpu()
        engine = config.engine
        self._transformer = transformer_config(config, self.device, self._dtype)
        # Another engine of this process, such as a critic's policy, has laid out the ranks already.
        self._owns_layout = not parallel_state.model_parallel_is_initialized()
        if self._owns_layout:
            parallel_state.initialize_model_parallel(
                engine.tensor_parallel,
                engine.pipeline_parallel,
                engine.virtual_pipeline if engine.virtual_pipeline > 1 else None,
                context_parallel_size=engine.context_parallel,
            )
        if self.device.type == "cuda":
            tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        self.data_parallel_group = parallel_state.get_data_parallel_group()
        # Ranks that share a replica's tokens have the same weights; those that have the first ones speak for it.
        self._has_first_tokens = parallel_state.get_context_parallel_rank() == 0
        self._model_main = min(dist.get_process_group_ranks(parallel_state.get_model_parallel_group()))
        # Micro-batches whose biases are needed again: those in flight in the pipeline. Each piece of a row has its own.
        pieces = 2 if engine.context_parallel > 1 else 1
        self._bias_cache = BiasCache(2 * pieces * engine.pipeline_parallel * engine.virtual_pipeline)
        self._padded_vocab = -(-config.model.vocab_size // engine.tensor_parallel) * engine.tensor_parallel
        self._modules = [self._build_module(i) for i in range(engine.virtual_pipeline)]
        if trained:
            self._prepare_training()

    @property
    def is_replica_main(self) -> bool:
        return self.rank == self._model_main and self._has_first_tokens

    def num_parameters(self) -> int:
        return num_parameters(self.config.model)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        weight_exchange.load(self._modules, weights, self.config.model, self._padded_vocab)
        if self._trained:
            self._adamw.megatron.reload_model_params()

    def full_weights(self, device: torch.device, every_replica: bool) -> Iterator[tuple[str, Tensor]]:
        self._gather_weights()
        if not self._has_first_tokens or (self.data_parallel_rank and not every_replica):
            return iter(())
        return weight_exchange.full_weights(self._modules, self.config.model, self._model_main, self.device, device)

    def from_replica_main(self, value: T) -> T:
        box = [value]
        for group in (parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()):
            dist.broadcast_object_list(box, min(dist.get_process_group_ranks(group)), group, self.device)
        return box[0]

    def train_step(self, micro_batches: Sequence[TokenBatch], objective: Objective, learning_rate: float) -> StepResult:
        self._adamw.zero_grad()
        names, totals = self._measure(micro_batches, objective, forward_only=False)
        is_first_copy = self.data_parallel_rank == 0 and self._has_first_tokens
        norm_counts = self.config.engine.distributed_optimizer or is_first_copy
        squared_norm = self._adamw.squared_norm()
        totals = torch.cat([totals, (squared_norm if norm_counts else torch.zeros_like(squared_norm)).view(1)])
        dist.all_reduce(totals)
        loss_sum, weight, *sums, squared_norm = totals.tolist()
        loss = loss_sum / weight if weight else math.nan
        # Micro-batches add up sums; the one division by the global weight comes here.
        norm = math.sqrt(squared_norm) / weight if weight else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(f"loss {loss}, gradient norm {norm}")
        clip = self.config.optimizer.clip_grad_norm
        self._adamw.step((min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0) / weight, learning_rate)
        return StepResult(loss, norm, _by_name(names, sums))

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[TokenBatch], objective: Objective) -> dict[str, tuple[float, float]]:
        names, totals = self._measure(micro_batches, objective, forward_only=True)
        dist.all_reduce(totals)
        return _by_name(names, totals.tolist()[2:])

    @torch.no_grad()
    def outputs(self, micro_batches: Sequence[TokenBatch], entropies: bool = False) -> list[TokenOutputs]:
        batches = [batch.to(self.device) for batch in micro_batches]
        kept = self._run(batches, _keep_outputs, entropies, forward_only=True)
        has_values = self.config.model.value_head
        if kept:
            packed = torch.stack(kept)
        else:
            shape = (len(batches), 1 + entropies + has_values, *batches[0].input_ids.shape)
            packed = torch.empty(shape, device=self.device)
        dist.broadcast(
            packed,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return [
            TokenOutputs(each[0], each[1] if entropies else None, each[-1] if has_values else None) for each in packed
        ]

    def save(self, directory: Path, background: bool = False) -> None:
        self._gather_weights()
        self._checkpoints.save(directory, background)

    def finish_saving(self, wait: bool) -> bool:
        return self._checkpoints.finish(wait)

    def load(self, directory: Path) -> None:
        self._checkpoints.load(directory)

    def barrier(self) -> None:
        dist.barrier()

    def any_rank(self, flag: bool) -> bool:
        answer = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer)

    def close(self) -> None:
        if self._trained:
            self.finish_saving(wait=True)
        if self._owns_layout:
            parallel_state.destroy_model_parallel()
        if self._owns_process_group:
            dist.destroy_process_group()

    def _prepare_training(self) -> None:
        """Buffers for gradients around the modules, and the optimizer."""
        config, ddp = self.config, ddp_config(self.config, self.device)
        self._chunks = [
            # Buckets are for overlapping the first chunk's reduction with its backward.
            DistributedDataParallel(self._transformer, ddp, module, disable_bucketing=index > 0)
            for index, module in enumerate(self._modules)
        ]
        self._adamw = AdamW(config, self._chunks, self._dtype)
        self._checkpoints = CheckpointIO(
            self._chunks, self._adamw, config.model.vocab_size, on_cpu=self.device.type == "cpu"
        )
        self._transformer.finalize_model_grads_func = _finalize_gradients
        if ddp.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self._chunks]
            self._transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def _gather_weights(self) -> None:
        """Put together what the last step has left to the next forward where the two overlap: until then a rank has
        the new values of its own part of the weights alone."""
        for chunk in self._chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _build_module(self, index: int) -> Step1MegatronModel:
        vp_stage = index if self.config.engine.virtual_pipeline > 1 else None
        model = Step1MegatronModel(
            self._transformer,
            self.config.model,
            self._padded_vocab,
            self._bias_cache,
            self.config.engine.recompute,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        ).to(self.device)
        fuse(model, liger_parts(self.config.engine.fused_kernels, self.device, self.config.model.hidden_size))
        return model

    def _measure(
        self, micro_batches: Sequence[TokenBatch], objective: Objective, forward_only: bool
    ) -> tuple[list[str], Tensor]:
        """Loss and metrics, and without `forward_only` the gradients in their buffers.

        Returns:
            Metric names, and float64 [2 + 2 * metrics]: loss sum, weight sum, each metric's sum and weight. The vector
            is zero but on one rank of each replica, so that adding it over all ranks counts every token once.
        """
        batches = [batch.to(self.device) for batch in micro_batches]
        # All ranks need the names; an objective has the same ones for every batch, whatever the outputs.
        names = list(objective(blank_outputs(self.config, batches[0], objective), batches[0]).metrics)
        loss = partial(_loss, objective=objective)
        packed = self._run(batches, loss, needs_entropies(objective), forward_only)
        if packed and self._has_first_tokens and parallel_state.get_tensor_model_parallel_rank() == 0:
            return names, torch.stack(packed).sum(0)
        return names, torch.zeros(2 + 2 * len(names), dtype=torch.float64, device=self.device)

    def _run(
        self, batches: Sequence[TokenBatch], loss: _LossFunction, entropies: bool, forward_only: bool
    ) -> list[Tensor]:
        """Forward, and backward unless `forward_only`, of all micro-batches through the pipeline.

        Returns:
            On the last pipeline stage, what `loss` has to keep of each; nothing elsewhere.
        """
        self._check_shapes(batches)
        rows, length = batches[0].input_ids.shape
        chunks = self._chunks if self._trained else self._modules
        iterators = [iter(batches) for _ in chunks]
        for chunk in chunks:
            chunk.train(not forward_only)
        try:
            return get_forward_backward_func()(
                forward_step_func=partial(_forward_step, loss=loss, entropies=entropies),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=rows,
                forward_only=forward_only,
            )
        finally:
            self._bias_cache.clear()

    def _check_shapes(self, batches: Sequence[TokenBatch]) -> None:
        shapes = [tuple(batch.input_ids.shape) for batch in batches]
        if len(set(shapes)) != 1:
            raise ValueError(f"a pipeline needs micro-batches of one shape, got {shapes}; drop or fill the last one")
        stages = self.config.engine.pipeline_parallel
        if self.config.engine.virtual_pipeline > 1 and len(batches) % stages:
            raise ValueError(
                f"the interleaved pipeline schedule needs a multiple of {stages} micro-batches, got {len(batches)}"
            )


def _forward_step(batches: Iterator[TokenBatch], chunk: nn.Module, loss: _LossFunction, entropies: bool) -> Any:
    batch = next(batches)
    output = chunk(batch.input_ids, batch.documents, batch.targets, batch.loss_weights != 0, entropies)
    # Megatron-Core calls the second on the last stage alone, where there are outputs of tokens.
    return output, lambda output: loss(TokenOutputs(*output), batch)


def _loss(outputs: TokenOutputs, batch: TokenBatch, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    output = objective(outputs, batch)
    return loss_of_all(outputs, output), _no_tokens(outputs), _pack(output)


def _keep_outputs(outputs: TokenOutputs, _: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """No loss; keeps the outputs that there are, [1 to 3, R, T]."""
    present = [x for x in (outputs.log_probs, outputs.entropies, outputs.values) if x is not None]
    return outputs.log_probs.sum(), _no_tokens(outputs), torch.stack(present)


def _no_tokens(outputs: TokenOutputs) -> Tensor:
    return torch.zeros((), dtype=torch.int, device=outputs.log_probs.device)


def _pack(output: ObjectiveOutput) -> Tensor:
    heads = torch.stack([output.loss_sum.detach(), output.weight_sum])
    return torch.cat([heads, *output.metrics.values()]).double()


def _by_name(names: Sequence[str], sums: Sequence[float]) -> dict[str, tuple[float, float]]:
    return dict(zip(names, zip(sums[::2], sums[1::2], strict=True), strict=True))


def _finalize_gradients(chunks: list[DistributedDataParallel], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Add the gradients over data-parallel ranks, and what sequence parallelism cut. The engine scales them."""
    finalize_model_grads(chunks, None, **kwargs)
