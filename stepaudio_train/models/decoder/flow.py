"""Flow matching: dual-code tokens to a mel spectrum (paper 3.3), with the released TTS-3B decoder's names and formula.

Tokens are embedded and encoded, brought to the mel's frame rate, and condition a network that moves noise to a mel in
a few Euler steps. A prompt's tokens, mel and speaker embedding say whose voice it is to be.

Shapes: B clips, T tokens, F mel frames, M mel bins, S segments of a clip: the prompt, and what is to be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.audio.features import pad_clips
from stepaudio_train.config.decoder import FlowConfig, FlowSolverConfig
from stepaudio_train.config.errors import UserError
from stepaudio_train.models.decoder.encoder import ConformerEncoder
from stepaudio_train.models.decoder.length_regulator import LengthRegulator
from stepaudio_train.models.decoder.masking import mask_of
from stepaudio_train.models.decoder.unet import VelocityUNet


class FlowError(UserError, ValueError):
    """Tokens, a prompt or weights that the flow cannot take. The message says which and why."""


@dataclass(frozen=True)
class FlowPrompt:
    """Whose voice it is to be, on the CPU. Tokens and mel are of one recording; without them the embedding says all."""

    speaker: Tensor
    """[speaker size] float32, of any length: it is brought to length 1."""
    tokens: Tensor
    """[P] int64."""
    mel: Tensor
    """[frames, M] float32."""

    @classmethod
    def of_speaker(cls, speaker: Tensor, num_mel_bins: int) -> FlowPrompt:
        """A prompt without a recording."""
        return cls(speaker, torch.zeros(0, dtype=torch.int64), torch.zeros(0, num_mel_bins))


@dataclass(frozen=True)
class FlowInputs:
    """A batch of clips that a mel is made for."""

    tokens: Tensor
    """[B, T] int64, a clip's segments one behind another; any of the vocabulary's ids behind the end."""
    num_tokens: Tensor
    """[B, S] int64."""
    num_frames: Tensor
    """[B, S] int64: the frames that each segment's tokens are stretched to."""
    speaker: Tensor
    """[B, speaker size] float32."""
    given_mel: Tensor
    """[B, F, M] float32: frames that are known, 0 where none are."""


class FlowMatching(nn.Module):
    """The whole model; call `eval()` before a mel is drawn.

    Conditions are [B, 3 M, F]: the encoder's mel, the speaker, the given mel.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.input_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.spk_embed_affine_layer = nn.Linear(config.speaker_size, config.num_mel_bins)
        self.encoder = ConformerEncoder(config)
        self.encoder_proj = nn.Linear(config.hidden_size, config.num_mel_bins)
        self.length_regulator = LengthRegulator(config.num_mel_bins)
        self.decoder = nn.ModuleDict({"estimator": VelocityUNet(config)})

    @classmethod
    def from_state_dict(cls, config: FlowConfig, weights: Mapping[str, Tensor]) -> FlowMatching:
        """A model of copies of given weights, in float32.

        Raises:
            FlowError: names or shapes are not those of `config`.
        """
        model = cls(config)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise FlowError(f"these weights are not of the configured sizes: {error}") from error
        return model

    @property
    def device(self) -> torch.device:
        return self.input_embedding.weight.device

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse ids that are no tokens of the speech decoder.

        Raises:
            FlowError: the first such id of [n] int64, and where it stands.
        """
        wrong = ((tokens < 0) | (tokens >= self.config.vocab_size)).nonzero()
        if len(wrong):
            position = int(wrong[0])
            raise FlowError(
                f"token {int(tokens[position])} at position {position}: the speech decoder takes 0 to "
                f"{self.config.vocab_size - 1}; give audio ids alone, less the size of the text vocabulary"
            )

    def encoded_mel(self, inputs: FlowInputs) -> tuple[Tensor, Tensor | None]:
        """The encoder's mel [B, M, F], and the mask of the frames as in `VelocityUNet.forward`."""
        token_mask = mask_of(inputs.num_tokens.sum(1), inputs.tokens.shape[1])
        encoded = self.encoder_proj(self.encoder(self.input_embedding(inputs.tokens), token_mask))
        return self.length_regulator(encoded, inputs.num_tokens, inputs.num_frames, inputs.given_mel.shape[1])

    def condition(self, inputs: FlowInputs) -> tuple[Tensor, Tensor | None]:
        """What the network is told, and the mask of the frames."""
        mel, mask = self.encoded_mel(inputs)
        size = mel.shape[2]
        speaker = self.spk_embed_affine_layer(F.normalize(inputs.speaker, dim=1))
        given = inputs.given_mel.transpose(1, 2)
        return torch.cat([mel, speaker[:, :, None].expand(-1, -1, size), given], dim=1), mask

    @torch.no_grad()
    def start_at(self, mel: Tensor) -> None:
        """Let untrained weights say the mel [M], in every frame, by the biases of both outputs."""
        self.length_regulator.model[-1].bias.copy_(mel)
        self.decoder["estimator"].final_proj.bias.copy_(mel)

    def velocity(self, x: Tensor, condition: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        """As `VelocityUNet.forward`."""
        return self.decoder["estimator"](x, condition, time, mask)

    @torch.inference_mode()
    def solve(self, inputs: FlowInputs, noise: Tensor, solver: FlowSolverConfig) -> Tensor:
        """Mel [B, F, M], prompt included, moved from noise [B, F, M], or from noise and the encoder's mel
        (`FlowConfig.start_time`), by Euler steps of the cosine schedule."""
        condition, mask = self.condition(inputs)
        start, x = self.config.start_time, noise.transpose(1, 2)
        if start > 0:
            x = torch.lerp(x, condition[:, : self.config.num_mel_bins], start)
        num_steps = max(1, round((1 - start) * solver.num_steps))
        times = (start + (1 - start) * cosine_times(torch.linspace(0, 1, num_steps + 1))).tolist()
        for time, following in pairwise(times):
            x = x + (following - time) * self._guided_velocity(x, condition, time, mask, solver.guidance)
        return x.transpose(1, 2)

    def generate(
        self, tokens: Sequence[Tensor], prompts: Sequence[FlowPrompt], solver: FlowSolverConfig
    ) -> list[Tensor]:
        """Mel spectra [frames_i, M] of clips [n_i] int64 in the voices of their prompts, on the CPU.

        A clip gets the frames that it gets alone: neighbours in the batch change nothing, and neither does the device.

        Raises:
            FlowError: an id out of range, a clip without tokens, a prompt with tokens or mel alone.
        """
        clips = [
            self.inputs(clip, prompt, self.config.num_frames(len(clip)))
            for clip, prompt in zip(tokens, prompts, strict=True)
        ]
        noises = [seeded_noise(clip.given_mel.shape[1], self.config.num_mel_bins, solver.seed) for clip in clips]
        batch = FlowInputs(
            pad_clips([clip.tokens[0] for clip in clips])[0],
            torch.cat([clip.num_tokens for clip in clips]),
            torch.cat([clip.num_frames for clip in clips]),
            torch.cat([clip.speaker for clip in clips]),
            pad_clips([clip.given_mel[0] for clip in clips])[0],
        )
        mels = self.solve(batch, pad_clips(noises)[0].to(self.device), solver).cpu()
        spans = batch.num_frames.tolist()
        return [mel[prompt : prompt + made] for mel, (prompt, made) in zip(mels, spans, strict=True)]

    def inputs(
        self, tokens: Tensor, prompt: FlowPrompt, num_frames: int, begun_mel: Tensor | None = None
    ) -> FlowInputs:
        """A batch of one clip on the model's device.

        Args:
            tokens: [n] int64; prompt: the voice; num_frames: of the tokens, without the prompt's.
            begun_mel: [frames, M], the tokens' first frames where they are known already.

        Raises: as `generate`.
        """
        self.check_tokens(prompt.tokens)
        self.check_tokens(tokens)
        if num_frames < 1:
            raise FlowError(f"{len(tokens)} token(s) are not a frame of mel; give more")
        if bool(len(prompt.tokens)) != bool(len(prompt.mel)):
            raise FlowError(
                f"a prompt of {len(prompt.tokens)} token(s) and {len(prompt.mel)} mel frame(s): give both of one "
                "recording, or neither"
            )
        given = prompt.mel if begun_mel is None else torch.cat([prompt.mel, begun_mel])
        given = F.pad(given, (0, 0, 0, len(prompt.mel) + num_frames - len(given)))
        return FlowInputs(
            torch.cat([prompt.tokens, tokens])[None].to(self.device),
            torch.tensor([[len(prompt.tokens), len(tokens)]], device=self.device),
            torch.tensor([[len(prompt.mel), num_frames]], device=self.device),
            prompt.speaker[None].to(self.device),
            given[None].to(self.device),
        )

    def _guided_velocity(
        self, x: Tensor, condition: Tensor, time: float, mask: Tensor | None, guidance: float
    ) -> Tensor:
        """(1 + g) v(condition) - g v(nothing): classifier-free guidance, in one pass of twice the batch."""
        if not guidance:
            return self.velocity(x, condition, x.new_full((len(x),), time), mask)
        both = torch.cat([condition, torch.zeros_like(condition)])
        velocity = self.velocity(
            torch.cat([x, x]), both, x.new_full((len(both),), time), None if mask is None else torch.cat([mask, mask])
        )
        told, untold = velocity.chunk(2)
        return (1 + guidance) * told - guidance * untold


def cosine_times(uniform: Tensor) -> Tensor:
    """0..1 -> 0..1, denser near 0, where the mel begins to take shape."""
    return 1 - torch.cos(uniform * (torch.pi / 2))


def seeded_noise(num_frames: int, num_mel_bins: int, seed: int) -> Tensor:
    """[frames, M] float32 normal noise on the CPU. More frames of one seed begin with the same ones."""
    return next_noise(num_frames, num_mel_bins, torch.Generator().manual_seed(seed))


def next_noise(num_frames: int, num_mel_bins: int, generator: torch.Generator) -> Tensor:
    """[frames, M] float32, drawn frame by frame: what is drawn at once and in parts is the same."""
    frames = [torch.randn(num_mel_bins, generator=generator) for _ in range(num_frames)]
    return torch.stack(frames) if frames else torch.zeros(0, num_mel_bins)
