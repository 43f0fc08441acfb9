"""What a flow learns by: the loss of flow matching, its optimizer, and the loss on held-out clips."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from stepaudio_train.audio.features import length_mask, pad_clips
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.flow_training import FlowTrainConfig
from stepaudio_train.data.paired_speech import PairedClip
from stepaudio_train.models.decoder.flow import FlowMatching
from stepaudio_train.models.decoder.flow_loss import FlowBatch, FlowDraws, FlowLoss, encoder_loss, flow_loss
from stepaudio_train.models.decoder.weights import read_weights
from stepaudio_train.tokenizers.learning.parallel import all_sum, sum_gradients
from stepaudio_train.training.learning import load_optimizer, save_optimizer, update_average

_WEIGHTS, _AVERAGE, _OPTIMIZER = "flow.safetensors", "average.safetensors", "optimizer.safetensors"


class FlowLearner:
    """A flow and the running average of its weights, which is the result. A `Learner`."""

    def __init__(self, config: FlowTrainConfig, held_out: Sequence[FlowBatch], device: torch.device) -> None:
        """
        Args:
            held_out: what `measure` measures.

        Raises:
            DecoderWeightError, FlowError: `init` cannot be used.
        """
        self._config, self._held_out, self._device = config, held_out, device
        torch.manual_seed(config.seed)
        flow = FlowMatching(config.flow)
        if config.init is not None:
            flow = FlowMatching.from_state_dict(config.flow, read_weights(Path(config.init)))
        self.flow = flow.to(device)
        self.average = copy.deepcopy(self.flow).eval().requires_grad_(False)
        # Fused: one pass over the weights, which are many for the work of a step on a CPU.
        self._optimizer = torch.optim.Adam(self.flow.parameters(), fused=True)
        if config.precision == "bf16":
            network = self.flow.decoder["estimator"]
            network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)

    def step(self, number: int, batch: FlowBatch) -> dict[str, float]:
        """As `Learner.step`.

        Raises:
            UserError: the loss is not finite, on every process.
        """
        settings, encoder_steps = self._config.optimizer, self._config.training.encoder_steps
        alone = number <= encoder_steps
        if number == 1 and self._config.init is None:
            self._begin_at_the_mean(batch)
        # Of dropout. So chance has no state that a checkpoint would have to hold.
        torch.manual_seed(self._seed(number))
        loss = self._loss(self.flow.train(), batch, self._seed(number), alone)
        encoder_weight = 1.0 if alone else self._config.training.encoder_weight
        num_frames = all_sum(loss.num_frames.float())
        share = (loss.velocity_sum + encoder_weight * loss.encoder_sum) / num_frames
        total = float(all_sum(share.detach().clone()))
        if not math.isfinite(total):
            raise UserError(
                f"step {number}: the loss is {total}; checkpoints are untouched. Type a lower optimizer.learning_rate "
                "and another run_dir"
            )
        self._optimizer.zero_grad(set_to_none=True)
        share.backward()
        # A gradient of zero would count in Adam's averages: the network has none until it learns.
        parameters = [
            parameter
            for name, parameter in self.flow.named_parameters()
            if not (alone and name.startswith(("decoder.", "spk_embed_affine_layer.")))
        ]
        sum_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        # Of the phase, which each begin anew.
        number = number if alone else number - encoder_steps
        rate = settings.learning_rate * min(number / settings.warmup_steps, math.sqrt(settings.warmup_steps / number))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        update_average(self.average, self.flow, settings.average, number)
        encoder = float(all_sum(loss.encoder_sum.detach()) / num_frames)
        return {"loss": total, "loss/encoder": encoder, "learning_rate": rate, "grad_norm": float(norm)}

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """The averaged weights' losses on held-out clips, with the same noise every time: `val/loss` of the velocity,
        `val/loss/encoder` of the encoder's mel."""
        losses = [self._loss(self.average, batch, number) for number, batch in enumerate(self._held_out)]
        num_frames = sum(int(loss.num_frames) for loss in losses)
        return {
            "val/loss": sum(float(loss.velocity_sum) for loss in losses) / num_frames,
            "val/loss/encoder": sum(float(loss.encoder_sum) for loss in losses) / num_frames,
        }

    def save(self, folder: Path) -> None:
        """As `Learner.save`."""
        save_file(self.flow.state_dict(), folder / _WEIGHTS)
        save_file(self.average.state_dict(), folder / _AVERAGE)
        save_optimizer(self._optimizer, folder / _OPTIMIZER)

    def load(self, folder: Path) -> None:
        """As `Learner.load`."""
        self.flow.load_state_dict(load_file(folder / _WEIGHTS))
        self.average.load_state_dict(load_file(folder / _AVERAGE))
        load_optimizer(self._optimizer, folder / _OPTIMIZER)

    def _seed(self, number: int) -> int:
        """Another one for each step and each process."""
        return (self._config.seed * 10**7 + number) * 10**4 + dist.get_rank()

    def _begin_at_the_mean(self, batch: FlowBatch) -> None:
        """Both outputs begin at the mean mel of the first batch: log mels lie far from 0, where weights begin."""
        inside = length_mask(batch.num_frames, batch.mel.shape[1])[:, :, None]
        total = all_sum((batch.mel * inside).sum(dim=(0, 1)).to(self._device))
        mean = total / all_sum(batch.num_frames.sum().float().to(self._device))
        for flow in (self.flow, self.average):
            flow.start_at(mean)

    def _loss(self, flow: FlowMatching, batch: FlowBatch, seed: int, encoder_alone: bool = False) -> FlowLoss:
        moved = FlowBatch(**{field.name: getattr(batch, field.name).to(self._device) for field in fields(batch)})
        if encoder_alone:
            return encoder_loss(flow, moved)
        return flow_loss(flow, moved, FlowDraws.draw(moved, torch.Generator().manual_seed(seed)))


def flow_batch(clips: Sequence[PairedClip]) -> FlowBatch:
    """Clips as one batch, padded."""
    tokens, mels, speakers = zip(*clips, strict=True)
    return FlowBatch(*pad_clips(tokens), *pad_clips(mels), torch.stack(speakers))
