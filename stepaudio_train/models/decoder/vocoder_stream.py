"""Sound while the mel frames are still being made: mel in pieces of any size, samples out as early as may be.

Every frame is decoded along with as many frames on each side as it depends on, and the source of a frame is made once
and kept. So the pieces join without a fade, and the samples are those of `HiFTGenerator.forward` for the whole clip
with the same seed, but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepaudio_train.models.decoder.vocoder import HiFTGenerator


class VocoderStream:
    """One clip's way through the vocoder. It holds two contexts of mel frames and their source, however long the clip.

    Samples come `look_ahead_frames` behind the mel.
    """

    def __init__(self, vocoder: HiFTGenerator, generator: torch.Generator) -> None:
        """`generator` as in `HiFTGenerator.forward`."""
        device = vocoder.stft_window.device
        self._vocoder = vocoder
        self._generator = generator
        self._context = vocoder.context_frames()
        self._mel = torch.zeros(1, vocoder.config.mel.num_bins, 0, device=device)
        self._source = torch.zeros(1, 0, device=device)
        self._source_state = vocoder.m_source.begin(1, generator)
        self._given = 0
        """Frames at the beginning of `_mel` whose samples are given out."""

    @property
    def look_ahead_frames(self) -> int:
        """Mel frames behind a frame that have to be there before its samples come."""
        return self._context + self._vocoder.f0_predictor.context_frames

    def feed(self, mel: Tensor) -> Tensor:
        """Add frames [1, M, t], any t; the samples [1, n] that are now certain, a whole number of frames."""
        self._mel = torch.cat([self._mel, mel], dim=2)
        return self._advance(self._vocoder.f0_predictor.context_frames, self._context)

    def finish(self) -> Tensor:
        """The clip ends: the samples [1, n] of the frames that are left. The stream takes no more frames."""
        return self._advance(0, 0)

    @torch.inference_mode()
    def _advance(self, f0_look_ahead: int, look_ahead: int) -> Tensor:
        """Make the source and the samples of all frames but the last that wait for frames behind them."""
        vocoder, hop = self._vocoder, self._vocoder.config.mel.hop_samples
        sourced = self._source.shape[1] // hop
        end = max(self._mel.shape[2] - f0_look_ahead, sourced)
        if end > sourced:
            f0_hz = vocoder.f0_predictor(self._mel)[:, sourced:end]
            source, self._source_state = vocoder.m_source(f0_hz, self._source_state, self._generator)
            self._source = torch.cat([self._source, source], dim=1)
        ready = max(end - look_ahead, self._given)
        if ready == self._given:
            return self._source[:, :0]
        samples = vocoder.decode(self._mel[:, :, :end], self._source)[:, self._given * hop : ready * hop]
        dropped = max(ready - self._context, 0)
        self._mel, self._source = self._mel[:, :, dropped:], self._source[:, dropped * hop :]
        self._given = ready - dropped
        return samples
