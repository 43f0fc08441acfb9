"""Speech tokens to sound: flow and vocoder as one (paper 3.3), whole clips or while their tokens come.

Shapes: N samples, M mel bins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from stepaudio_train.audio.features import batches_of_like_length
from stepaudio_train.config.decoder import FlowSolverConfig, FlowStreamConfig, flow_inference_problems
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.data.paired_speech import clip_mel
from stepaudio_train.models.decoder.flow import FlowError, FlowMatching, FlowPrompt
from stepaudio_train.models.decoder.flow_files import find_speaker, load_flow
from stepaudio_train.models.decoder.flow_stream import FlowStream
from stepaudio_train.models.decoder.released import is_released_decoder, read_released_flow, read_released_vocoder
from stepaudio_train.models.decoder.speaker import SpeakerEmbedding
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import load_vocoder
from stepaudio_train.models.decoder.vocoder_stream import VocoderStream
from stepaudio_train.tokenizers.dual import (
    LINGUISTIC_PER_GROUP,
    SEMANTIC_PER_GROUP,
    TOKENS_PER_GROUP,
    merge_streams,
    split_streams,
)
from stepaudio_train.tokenizers.learning.optimisation import resolve_device
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.vocabulary import AUDIO_IDS

_LONGEST_TOKENS = 2500
"""Clips of over a minute are made as they are streamed: the flow's memory grows with the square of the length."""


class SpeechDecoder:
    """The speech decoder with the speaker encoder that it learned with. The same tokens and prompt, the same sound."""

    def __init__(
        self,
        flow: FlowMatching,
        vocoder: HiFTGenerator,
        speaker: SpeakerEmbedding,
        solver: FlowSolverConfig | None = None,
        device: str = "auto",
    ) -> None:
        """Raises:
        FlowError: the vocoder takes another mel than the flow makes.
        ConfigError: a solver that cannot be.
        """
        made = (flow.config.num_mel_bins, flow.config.sample_rate_hz, flow.config.hop_samples)
        mel = vocoder.config.mel
        if made != (mel.num_bins, mel.sample_rate_hz, mel.hop_samples):
            raise FlowError(
                f"flow and vocoder do not fit: one makes mels of (bins, Hz, hop) {made}, the other takes "
                f"{(mel.num_bins, mel.sample_rate_hz, mel.hop_samples)}"
            )
        self.solver = solver or FlowSolverConfig()
        if problems := flow_inference_problems(self.solver, FlowStreamConfig()):
            raise ConfigError(problems)
        self.device = resolve_device(device)
        self.flow, self.vocoder = flow.to(self.device).eval(), vocoder.to(self.device).eval()
        self._speaker = speaker

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        vocoder: Path | None = None,
        solver: FlowSolverConfig | None = None,
        device: str = "auto",
    ) -> SpeechDecoder:
        """Read what the recipes `flow` and `vocoder` wrote, or a released directory (`CosyVoice-300M-25Hz`).

        Args:
            directory: holds flow.safetensors and flow.json, and the speaker encoder that the flow learned with, if any;
                or is a released directory.
            vocoder: holds hift.safetensors and hift.json, or is a released directory; None: `directory`.
            solver: None: what a released directory says, or the default.

        Raises:
            DecoderWeightError, SpeakerError, FlowError: missing or broken files, or files that do not fit.
        """
        if is_released_decoder(directory):
            flow, released_solver = read_released_flow(directory)
            solver = solver or released_solver
        else:
            flow = load_flow(directory)
        speaker = find_speaker(directory, flow.config.speaker_size)
        vocoder = vocoder or directory
        read_vocoder = read_released_vocoder if is_released_decoder(vocoder) else load_vocoder
        return cls(flow, read_vocoder(vocoder), speaker, solver, device)

    @property
    def sample_rate_hz(self) -> int:
        """Of the sound that is made."""
        return self.flow.config.sample_rate_hz

    def prompt(self, waveform: Tensor, speech: SpeechTokens | None = None) -> FlowPrompt:
        """The voice of a recording.

        Args:
            waveform: [samples] float32 at 16 kHz.
            speech: its tokens. With them what is made goes on from the recording; without, it has the voice alone.

        Raises:
            UserError: the recording is too short, or its tokens are not its own.
        """
        embedding = self._speaker.embed(waveform)
        if speech is None:
            return FlowPrompt.of_speaker(embedding, self.flow.config.num_mel_bins)
        tokens = audio_ids(speech)
        return FlowPrompt(embedding, tokens, clip_mel(waveform, len(tokens), self.flow.config))

    def decode(self, codes: Sequence[SpeechTokens], prompts: Sequence[FlowPrompt]) -> list[Tensor]:
        """Waveforms [N_i] float32 of clips in the voices of their prompts, on the CPU. Each is what it is alone.

        Clips that are over a minute long with their prompts are made as `stream` makes them.

        Raises:
            FlowError: codes that are none, or no whole group of them; the clip is named by its number.
        """
        clips = []
        for number, speech in enumerate(codes):
            try:
                clips.append(audio_ids(speech))
            except FlowError as error:
                raise FlowError(f"clip {number}: {error}") from None
        lengths = [len(clip) + len(prompt.tokens) for clip, prompt in zip(clips, prompts, strict=True)]
        found: list[Tensor] = [torch.empty(0)] * len(clips)
        # A clip of over half the limit is alone in its batch.
        for first, *others in batches_of_like_length(lengths, 2 * _LONGEST_TOKENS):
            if lengths[first] > _LONGEST_TOKENS:
                stream = self.stream(prompts[first])
                found[first] = torch.cat([stream.feed(clips[first]), stream.finish()])
                continue
            batch = [first, *others]
            mels = self.flow.generate([clips[i] for i in batch], [prompts[i] for i in batch], self.solver)
            for index, mel in zip(batch, mels, strict=True):
                found[index] = self._sound(mel)
        return found

    def stream(self, prompt: FlowPrompt, stream: FlowStreamConfig | None = None) -> SpeechStream:
        """A clip whose tokens are still coming.

        Raises:
            ConfigError: sizes that cannot be.
        """
        stream = stream or FlowStreamConfig()
        if problems := flow_inference_problems(self.solver, stream):
            raise ConfigError(problems)
        vocoder = VocoderStream(self.vocoder, self._generator())
        return SpeechStream(FlowStream(self.flow, prompt, stream, self.solver), vocoder, self.device)

    @torch.inference_mode()
    def _sound(self, mel: Tensor) -> Tensor:
        """[frames, M] -> [N]."""
        return self.vocoder(mel.T[None].to(self.device), self._generator()).waveform[0].cpu()

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.solver.seed)


class SpeechStream:
    """One clip's way from tokens to sound. What it gives, put together, is as `FlowStream` and `VocoderStream` say."""

    def __init__(self, flow: FlowStream, vocoder: VocoderStream, device: torch.device) -> None:
        self._flow, self._vocoder, self._device = flow, vocoder, device
        self._open = np.zeros(0, np.int64)
        self._begun_s: float | None = None
        self.first_audio_s: float | None = None
        """Seconds from the first tokens to the first samples; None until there are any."""

    def feed(self, ids: ArrayLike) -> Tensor:
        """Add audio ids [n], counted from the first linguistic one, any number of them; the samples [m] now made.

        Raises:
            FlowError: an id that is no audio id, or not of the kind whose turn it is; the stream is as it was.
        """
        if self._begun_s is None:
            self._begun_s = time.perf_counter()
        stream = np.concatenate([self._open, np.asarray(ids, np.int64)])
        _check_audio(stream)
        whole = len(stream) // TOKENS_PER_GROUP * TOKENS_PER_GROUP
        self._open = stream[whole:]
        return self._heard(self._vocode(self._flow.feed(torch.from_numpy(stream[:whole]))))

    def finish(self) -> Tensor:
        """The clip ends: the samples [m] that are left. The stream takes no more ids.

        Raises:
            FlowError: the last group is not whole.
        """
        if len(self._open):
            raise FlowError(
                f"the clip ends with {len(self._open)} token(s) of a group of {TOKENS_PER_GROUP}; give whole groups, "
                "two linguistic and three semantic"
            )
        last = self._vocode(self._flow.finish())
        return self._heard(torch.cat([last, self._vocoder.finish()[0].cpu()]))

    def _vocode(self, mel: Tensor) -> Tensor:
        return self._vocoder.feed(mel.T[None].to(self._device))[0].cpu()

    def _heard(self, samples: Tensor) -> Tensor:
        if self.first_audio_s is None and self._begun_s is not None and len(samples):
            self.first_audio_s = time.perf_counter() - self._begun_s
        return samples


def audio_ids(speech: SpeechTokens) -> Tensor:
    """Codes as the decoder takes them: [5 * groups] int64, counted from the first linguistic one.

    Raises:
        FlowError: a code outside its codebook, streams that are not of one recording, or no whole group.
    """
    groups = (len(speech.linguistic) // LINGUISTIC_PER_GROUP, len(speech.semantic) // SEMANTIC_PER_GROUP)
    if abs(groups[0] - groups[1]) > 1:
        raise FlowError(
            f"{len(speech.linguistic)} linguistic and {len(speech.semantic)} semantic codes are not of one "
            "recording: they come as two to three"
        )
    try:
        ids = merge_streams(speech.linguistic, speech.semantic, AUDIO_IDS)
    except ValueError as error:
        raise FlowError(f"{error}; codes are counted from 0 in each codebook") from None
    if not len(ids):
        raise FlowError("holds no whole group of two linguistic and three semantic codes; give 0.12 s or more")
    return torch.from_numpy(ids)


def _check_audio(ids: NDArray[np.int64]) -> None:
    """Raises:
    FlowError: an id that should not be where it is.
    """
    try:
        split_streams(ids, AUDIO_IDS)
    except ValueError as error:
        raise FlowError(f"{error}; ids are counted without the text vocabulary") from None
