"""What a vocoder learns by: its losses, its discriminators, two optimizers, and measurements on held-out clips.

Shapes: B segments, N samples, T mel frames, M mel bins.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepaudio_train.audio.mel import decoder_log_mel
from stepaudio_train.audio.pitch import yin
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.vocoder_training import VocoderOptimizerConfig, VocoderTrainConfig
from stepaudio_train.data.files import replacing
from stepaudio_train.data.segments import SegmentBatch, margin_samples
from stepaudio_train.models.decoder.discriminators import VocoderDiscriminators
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import load_vocoder_weights
from stepaudio_train.objectives.vocoder import JudgedSpeech, discriminator_losses, generator_losses, mel_loss
from stepaudio_train.tokenizers.learning.parallel import all_sum, sum_gradients
from stepaudio_train.training.learning import load_optimizer, save_optimizer, update_average
from stepaudio_train.training.loggers import MetricsLogger

_MEASURED_S = 4.0
"""Held-out clips are cut to this length."""


class HeldOutClips:
    """Clips that a vocoder never learns from: measured, and written where they can be heard beside their copies."""

    def __init__(self, clips: Sequence[Tensor], config: VocoderTrainConfig, logger: MetricsLogger | None) -> None:
        """
        Args:
            clips: [samples] at the mel's rate.
        """
        self._config, self._logger, self._highest_hz = config.vocoder, logger, config.losses.highest_hz
        self._folder, self._seed = Path(config.run_dir) / "samples", config.seed
        self._clips = [self._whole_frames(clip) for clip in clips]

    @torch.no_grad()
    def measure(self, vocoder: HiFTGenerator, step: int) -> dict[str, float]:
        """Make each clip anew from its mel and write both to samples/step_XXXXXXXX/.

        Returns:
            `val/mel`, the difference of the log-mel in nats; `val/f0_hz`, that of the pitch where the recording has a
            voice; `val/voicing`, the share of frames in which one has a voice and the other has none. All are means
            over frames.
        """
        mel, limit_hz = self._config.mel, self._config.voiced_threshold_hz
        spectral, pitch, voicing, frames, voiced_frames = 0.0, 0.0, 0.0, 0, 0
        for number, clip in enumerate(self._clips):
            waveform = clip[None].to(vocoder.stft_window.device)
            generator = torch.Generator(waveform.device).manual_seed(self._seed)
            made = vocoder(decoder_log_mel(waveform, mel), generator)
            wanted_hz = yin(clip, mel.sample_rate_hz, mel.hop_samples / mel.sample_rate_hz).f0_hz
            made_hz, voiced = made.f0_hz[0].cpu(), wanted_hz > limit_hz
            spectral += float(mel_loss(waveform, made.waveform, mel, self._highest_hz)) * len(voiced)
            pitch += float((made_hz - wanted_hz).abs()[voiced].sum())
            voicing += float(((made_hz > limit_hz) != voiced).sum())
            frames, voiced_frames = frames + len(voiced), voiced_frames + int(voiced.sum())
            for kind, samples in (("recorded", clip), ("generated", made.waveform[0].cpu())):
                self._write(f"{number:02d}_{kind}", samples, step)
        return {
            "val/mel": spectral / frames,
            "val/f0_hz": pitch / max(1, voiced_frames),
            "val/voicing": voicing / frames,
        }

    def _whole_frames(self, clip: Tensor) -> Tensor:
        """The clip's beginning, as many samples as whole frames have, and enough for a spectrum."""
        mel = self._config.mel
        cut = clip[: round(_MEASURED_S * mel.sample_rate_hz)]
        samples = max(len(cut), mel.window_samples) // mel.hop_samples * mel.hop_samples
        return F.pad(cut, (0, max(0, samples - len(cut))))[:samples]

    def _write(self, name: str, waveform: Tensor, step: int) -> None:
        rate_hz = self._config.mel.sample_rate_hz
        with replacing(self._folder / f"step_{step:08d}" / f"{name}.wav") as temporary:
            soundfile.write(temporary, waveform.numpy(), rate_hz, format="WAV")
        if self._logger is not None:
            self._logger.write_audio(name, waveform, rate_hz, step)


class VocoderLearner:
    """A vocoder, the running average of its weights, and its discriminators. A `Learner`.

    In every step the discriminators learn first, then the vocoder, from the same sound (HiFi-GAN, arXiv 2010.05646).
    What is drawn depends on the step and the segment's place in the whole batch, not on the processes that share it.
    """

    def __init__(self, config: VocoderTrainConfig, held_out: HeldOutClips, device: torch.device) -> None:
        """Raises:
        DecoderWeightError: `init` cannot be used.
        """
        self._config, self._held_out, self._device = config, held_out, device
        torch.manual_seed(config.seed)
        self.vocoder = HiFTGenerator(config.vocoder)
        self.discriminators = VocoderDiscriminators(config.discriminators).to(device)
        if config.init is not None:
            load_vocoder_weights(self.vocoder, Path(config.init))
        self.vocoder.to(device)
        self.average = copy.deepcopy(self.vocoder).eval().requires_grad_(False)
        rates = config.optimizer
        predictor = list(self.vocoder.f0_predictor.parameters())
        others = [p for name, p in self.vocoder.named_parameters() if not name.startswith("f0_predictor.")]
        judges = list(self.discriminators.parameters())
        self._optimiser = _Adam([(others, rates.learning_rate), (predictor, rates.f0_learning_rate)], rates)
        self._judges_optimiser = _Adam([(judges, rates.discriminator_learning_rate)], rates)

    def step(self, number: int, batch: SegmentBatch) -> dict[str, float]:
        """One update of each.

        Returns:
            Losses of the whole batch, those of the discriminators once there are any; and the gradients' norms before
            clipping, `grad_norm` of the vocoder and `grad_norm/f0` of its pitch predictor.

        Raises:
            UserError: a loss is not finite, on every process.
        """
        recorded, mel = self._with_mel(batch.waveforms.to(self._device))
        waveforms, f0_hz = self._synthesise(mel, number)
        speech = [JudgedSpeech(recorded, batch.f0_hz.to(self._device)), JudgedSpeech(waveforms, f0_hz)]
        found: dict[str, Tensor] = {}
        turn = number - self._config.training.discriminators_from
        if turn > 0:
            found["loss/discriminators"] = self._teach_discriminators(recorded, waveforms.detach(), turn)
            speech = [self._judged(each) for each in speech]
        losses = generator_losses(*speech, self._config.vocoder.mel, self._config.losses)
        found |= {name if name == "loss" else f"loss/{name}": value for name, value in losses.items()}
        metrics = self._of_all(found, number)
        metrics["grad_norm"], metrics["grad_norm/f0"] = self._optimiser.update(losses["loss"], number)
        update_average(self.average, self.vocoder, self._config.optimizer.average, number)
        return metrics

    def measure(self, step: int) -> dict[str, float]:
        """As `HeldOutClips.measure`, of the average."""
        return self._held_out.measure(self.average, step)

    def save(self, folder: Path) -> None:
        """Write models and optimizers, as safetensors."""
        for name, module in self._modules.items():
            save_file({key: value.contiguous() for key, value in module.state_dict().items()}, folder / name)
        for name, optimiser in self._optimisers.items():
            save_optimizer(optimiser.adam, folder / name)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        for name, module in self._modules.items():
            module.load_state_dict(load_file(folder / name))
        for name, optimiser in self._optimisers.items():
            load_optimizer(optimiser.adam, folder / name)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {
            "vocoder.safetensors": self.vocoder,
            "average.safetensors": self.average,
            "discriminators.safetensors": self.discriminators,
        }

    @property
    def _optimisers(self) -> dict[str, _Adam]:
        return {
            "vocoder_optimizer.safetensors": self._optimiser,
            "discriminators_optimizer.safetensors": self._judges_optimiser,
        }

    def _with_mel(self, waveforms: Tensor) -> tuple[Tensor, Tensor]:
        """[B, margin + N + margin] samples -> [B, N], and their mel [B, M, T]."""
        config = self._config.vocoder.mel
        margin = margin_samples(config)
        frames = margin // config.hop_samples
        return waveforms[:, margin:-margin], decoder_log_mel(waveforms, config)[:, :, frames:-frames]

    def _synthesise(self, mel: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """[B, M, T] -> samples [B, N] and pitch [B, T]; noise and phases are drawn for each segment by itself."""
        f0_hz = self.vocoder.f0_predictor(mel)
        first = number * self._config.training.batch_segments + dist.get_rank() * len(mel)
        sources = []
        for row in range(len(mel)):
            generator = torch.Generator(self._device).manual_seed((self._config.seed << 40) + first + row)
            state = self.vocoder.m_source.begin(1, generator)
            sources.append(self.vocoder.m_source(f0_hz[row : row + 1], state, generator)[0])
        return self.vocoder.decode(mel, torch.cat(sources)), f0_hz

    def _teach_discriminators(self, recorded: Tensor, generated: Tensor, turn: int) -> Tensor:
        """The discriminators' update with this number; this process's share of their loss."""
        self.discriminators.requires_grad_(True)
        scores = [self.discriminators(waveforms).scores for waveforms in (recorded, generated)]
        loss = discriminator_losses(*scores, self._config.losses)["loss"]
        self._judges_optimiser.update(loss, turn)
        # In the vocoder's turn they are only asked.
        self.discriminators.requires_grad_(False)
        return loss

    def _judged(self, speech: JudgedSpeech) -> JudgedSpeech:
        scores, features = self.discriminators(speech.waveforms)
        return replace(speech, scores=scores, features=features)

    def _of_all(self, losses: dict[str, Tensor], number: int) -> dict[str, float]:
        """The losses of the whole batch."""
        shares = torch.stack([value.detach() for value in losses.values()]) / dist.get_world_size()
        found = dict(zip(losses, all_sum(shares).tolist(), strict=True))
        wrong = [name for name, value in found.items() if not math.isfinite(value)]
        if wrong:
            raise UserError(
                f"step {number}: {', '.join(wrong)} is not finite; checkpoints are untouched. Type a lower "
                "optimizer.learning_rate and another run_dir"
            )
        return found


class _Adam:
    """Adam over groups of parameters, each with a rate of its own and its gradient clipped apart."""

    def __init__(self, groups: Sequence[tuple[list[nn.Parameter], float]], config: VocoderOptimizerConfig) -> None:
        self._config, self._rates = config, [rate for _, rate in groups]
        self.adam = torch.optim.Adam(
            [{"params": parameters} for parameters, _ in groups], betas=config.betas, fused=True
        )

    def update(self, loss: Tensor, number: int) -> list[float]:
        """The update with this number, counted from 1, by the mean of the processes' losses.

        Returns:
            Each group's norm of the gradient before clipping.
        """
        half_life = self._config.half_life_steps
        decay = 1.0 if half_life is None else 0.5 ** ((number - 1) / half_life)
        self.adam.zero_grad(set_to_none=True)
        (loss / dist.get_world_size()).backward()
        norms = []
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * decay
            sum_gradients(group["params"])
            norms.append(float(nn.utils.clip_grad_norm_(group["params"], self._config.max_grad_norm)))
        self.adam.step()
        return norms
