"""One process, plain PyTorch: the reference that every other engine is tested against."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepaudio_train.config.schema import OptimizerConfig, RunConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.engines.base import Engine, NonFiniteError, StepResult
from stepaudio_train.engines.precision import choose_device, choose_dtype
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import hf_shapes
from stepaudio_train.objectives.base import Objective, ObjectiveOutput, TokenOutputs

_MODEL_FILE, _OPTIMIZER_FILE, _STATE_FILE = "model.safetensors", "optimizer.safetensors", "optimizer.json"


class LocalEngine(Engine):
    """The model of models/step1/modeling.py with torch's AdamW. bf16 is autocast over fp32 weights."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.rank, self.world_size = 0, 1
        self.data_parallel_rank, self.data_parallel_size = 0, 1
        self.device = choose_device(config.engine.device)
        self.dtype = choose_dtype(config.engine.precision, self.device)
        self.model = Step1ForCausalLM(config.model).to(self.device)
        self.optimizer = _make_optimizer(self.model, config.optimizer)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = dict(self.model.named_parameters())
        for name, shape in hf_shapes(self.config.model).items():
            tensor = weights[name]
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, the model needs {tuple(shape)}")
            own[name].data.copy_(tensor)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        own = dict(self.model.named_parameters())
        for name in hf_shapes(self.config.model):
            yield name, own[name].detach().float().cpu().clone()

    def train_step(self, micro_batches: Sequence[TokenBatch], objective: Objective, learning_rate: float) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        outputs = []
        for batch in micro_batches:
            output = self._forward(batch.to(self.device), objective)
            output.loss_sum.backward()
            outputs.append(output)
        weight = float(sum(o.weight_sum for o in outputs))
        loss = float(sum(o.loss_sum.detach() for o in outputs)) / weight if weight else math.nan
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        # Micro-batches add up sums, so the one division by the global weight comes here, together with the clipping.
        # Added up in float64: float32 is some 1e-5 off for a million elements.
        squares = sum(float(g.square().sum(dtype=torch.float64)) for g in grads)
        norm = math.sqrt(squares) / weight if weight else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(f"loss {loss}, gradient norm {norm}")
        clip = self.config.optimizer.clip_grad_norm
        torch._foreach_mul_(grads, (min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0) / weight)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["learning_rate_multiplier"]
        self.optimizer.step()
        return StepResult(loss, norm, _added(outputs))

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[TokenBatch], objective: Objective) -> dict[str, tuple[float, float]]:
        return _added([self._forward(batch.to(self.device), objective) for batch in micro_batches])

    def save(self, directory: Path, background: bool = False) -> None:
        """Synchronous whatever `background` says: one process has nothing to gain here."""
        weights = {name: p.detach().contiguous() for name, p in self.model.named_parameters()}
        save_file(weights, directory / _MODEL_FILE)
        tensors, steps = {}, {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter)
            if state:
                steps[name] = float(state["step"])
                tensors[f"exp_avg/{name}"] = state["exp_avg"].contiguous()
                tensors[f"exp_avg_sq/{name}"] = state["exp_avg_sq"].contiguous()
        save_file(tensors, directory / _OPTIMIZER_FILE)
        (directory / _STATE_FILE).write_text(json.dumps({"steps": steps}), encoding="utf-8")

    def load(self, directory: Path, optimizer: bool = True) -> None:
        self.load_weights(load_file(directory / _MODEL_FILE))
        if not optimizer:
            return
        tensors = load_file(directory / _OPTIMIZER_FILE)
        steps = json.loads((directory / _STATE_FILE).read_text(encoding="utf-8"))["steps"]
        for name, parameter in self.model.named_parameters():
            if name in steps:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(steps[name]),
                    "exp_avg": tensors[f"exp_avg/{name}"].to(self.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(self.device),
                }

    def barrier(self) -> None:
        """One process waits for nobody."""

    def any_rank(self, flag: bool) -> bool:
        return flag

    def close(self) -> None:
        """Nothing to leave."""

    def _forward(self, batch: TokenBatch, objective: Objective) -> ObjectiveOutput:
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        recompute = self.config.engine.recompute != "none" and torch.is_grad_enabled()
        with autocast:
            log_probs = self.model.log_probs(
                batch.input_ids, batch.targets, batch.documents, batch.loss_weights != 0, recompute
            )
        return objective(TokenOutputs(log_probs), batch)


def _make_optimizer(model: Step1ForCausalLM, config: OptimizerConfig) -> torch.optim.AdamW:
    embeddings = [model.model.embed_tokens.weight, model.lm_head.weight]
    chosen = {id(p) for p in embeddings}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "learning_rate_multiplier": 1.0},
        {"params": [p for p in rest if p.ndim == 1], "learning_rate_multiplier": 1.0, "weight_decay": 0.0},
        {"params": embeddings, "learning_rate_multiplier": config.embedding_learning_rate_multiplier},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def _added(outputs: Sequence[ObjectiveOutput]) -> dict[str, tuple[float, float]]:
    names = outputs[0].metrics if outputs else {}
    totals = {name: sum(o.metrics[name] for o in outputs).tolist() for name in names}
    return {name: (total[0], total[1]) for name, total in totals.items()}
