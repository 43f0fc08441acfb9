"""A mel spectrum while its tokens come (paper 3.3): tokens in, in pieces of any size, frames out chunk by chunk.

The released network sees a clip whole: attention in the encoder and the U-Net, and group norms over all frames. Frames
that come out before the last token can therefore not be those of `FlowMatching.generate`, whatever is computed. What is
done instead: a chunk is made with the frames that came out before it as given mel, as a prompt is, with the noise that
the whole clip has in its place, and with a few tokens behind it that it waits for. The frames of those are made twice,
and fade from the first making to the second. So a chunk goes on where the last one ended, and a clip of one chunk comes
out as it does offline. `tests/unit/models/test_flow_matching.py` measures the difference and the seams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepaudio_train.config.decoder import FlowSolverConfig, FlowStreamConfig
from stepaudio_train.models.decoder.flow import FlowMatching, FlowPrompt, next_noise


class FlowStream:
    """One clip's way through the flow. The work for a chunk is bounded by prompt, history, chunk and look-ahead."""

    def __init__(
        self, model: FlowMatching, prompt: FlowPrompt, stream: FlowStreamConfig, solver: FlowSolverConfig
    ) -> None:
        self._model, self._prompt, self._stream, self._solver = model, prompt, stream, solver
        num_mel_bins = model.config.num_mel_bins
        self._generator = torch.Generator().manual_seed(solver.seed)
        self._prompt_noise = next_noise(len(prompt.mel), num_mel_bins, self._generator)
        self._noise = torch.zeros(0, num_mel_bins)
        self._tokens = torch.zeros(0, dtype=torch.int64)
        self._mel = torch.zeros(0, num_mel_bins)
        self._ahead = torch.zeros(0, num_mel_bins)
        self._num_done = 0

    def feed(self, tokens: Tensor) -> Tensor:
        """Add [n] int64 tokens; the frames [f, M] of the chunks that are now complete, on the CPU.

        Raises:
            FlowError: an id out of range; the stream is as it was.
        """
        self._model.check_tokens(tokens)
        self._tokens = torch.cat([self._tokens, tokens.cpu()])
        before, size = len(self._mel), self._stream.chunk_tokens
        while len(self._tokens) >= self._num_done + size + self._stream.look_ahead_tokens:
            self._make_frames(self._num_done + size)
        return self._mel[before:]

    def finish(self) -> Tensor:
        """The frames [f, M] of the tokens that are left when the clip ends."""
        before = len(self._mel)
        if self._model.config.num_frames(len(self._tokens)) > before:
            self._make_frames(len(self._tokens))
        return self._mel[before:]

    def _make_frames(self, end: int) -> None:
        """Add the frames of the tokens up to `end`, which are conditioned on the ones before."""
        num_frames = self._model.config.num_frames
        start = max(0, self._num_done - self._stream.history_tokens)
        seen = self._tokens[start : end + self._stream.look_ahead_tokens]
        first, begun, last = num_frames(start), len(self._mel), num_frames(start + len(seen))
        inputs = self._model.inputs(seen, self._prompt, last - first, self._mel[first:begun])
        noise = torch.cat([self._prompt_noise, self._noise_until(last)[first:]])[None].to(self._model.device)
        mel = self._model.solve(inputs, noise, self._solver)[0].cpu()[len(self._prompt.mel) + begun - first :]
        num_faded = len(self._ahead)
        share = torch.arange(1, num_faded + 1)[:, None] / (num_faded + 1)
        mel = torch.cat([torch.lerp(self._ahead, mel[:num_faded], share), mel[num_faded:]])
        num_made = num_frames(end) - begun
        self._mel, self._ahead = torch.cat([self._mel, mel[:num_made]]), mel[num_made:]
        self._num_done = end

    def _noise_until(self, last: int) -> Tensor:
        """The noise [last, M] of the clip's frames so far."""
        missing = next_noise(last - len(self._noise), self._noise.shape[1], self._generator)
        self._noise = torch.cat([self._noise, missing])
        return self._noise[:last]
