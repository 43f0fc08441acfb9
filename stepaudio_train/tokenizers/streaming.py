"""Speech tokens while the speech goes on (paper 3.4): samples in, in pieces of any size, codes out as early as may be.

Linguistic codes come 4 at a time, when 240 ms are complete; semantic codes when a piece is (`SemanticConfig`: 30 s as
released; `SpeechTokenizer.with_pieces` makes shorter ones). Whatever the sizes of what is fed, the codes are those of
`SpeechTokenizer.encode` for the whole recording with the same rule. Only rounding differs, since one window and many
windows are not added up in the same order.

The level is the caller's: `encode` brings a recording to its peak, which nobody knows before its end. `gain_for_peak`
is the factor that `encode` takes for a peak that is known or assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepaudio_train.audio.features import FRAME_SHIFT
from stepaudio_train.audio.reading import PEAK_FLOOR, PEAK_TARGET
from stepaudio_train.tokenizers.dual import (
    LINGUISTIC_PER_GROUP,
    SEMANTIC_PER_GROUP,
    merge_streams,
    num_groups,
)
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SAMPLES_PER_TOKEN, SemanticTokenizer
from stepaudio_train.tokenizers.speech import SHORTEST_PIECE_SAMPLES, SpeechTokenizer, SpeechTokens
from stepaudio_train.tokenizers.vocabulary import Vocabulary

State = dict[str, Tensor]
"""Everything that a stream remembers, as tensors: can be saved as safetensors and loaded on another machine."""


class LinguisticStream:
    """One recording's way through the linguistic tokenizer."""

    def __init__(self, tokenizer: LinguisticTokenizer) -> None:
        self._tokenizer = tokenizer
        config, device = tokenizer.config, tokenizer.centroids.device
        self._chunk_samples = config.chunk_frames * config.lfr_stride * FRAME_SHIFT
        # A chunk's last 320 samples begin frames that only the next chunk completes.
        self._kept_samples = 2 * FRAME_SHIFT
        self.state: State = {
            "samples": torch.zeros(0, device=device),
            "fbank": torch.zeros(0, config.num_mel_bins, device=device),
            "overlap": torch.zeros(config.overlap_frames, config.input_size, device=device),
            "history": tokenizer.encoder.history(),
            "num_chunks": torch.zeros((), dtype=torch.int64),
        }

    @torch.inference_mode()
    def feed(self, samples: Tensor) -> Tensor:
        """Add [n] samples; the ids [m] int64 of the chunks that are now complete, 4 each."""
        state = self.state
        state["samples"] = torch.cat([state["samples"], samples])
        begun = self._kept_samples if int(state["num_chunks"]) else 0
        whole = (len(state["samples"]) - begun) // self._chunk_samples
        if not whole:
            return torch.zeros(0, dtype=torch.int64)
        end = begun + whole * self._chunk_samples
        frames = self._with_fbank_of(state["samples"][:end])
        state["samples"] = state["samples"][end - self._kept_samples :]
        state["fbank"] = frames[-1:]
        config = self._tokenizer.config
        stacked = frames.unfold(0, config.lfr_window, config.lfr_stride).transpose(1, 2).flatten(1)
        return self._encode(stacked, whole)

    @torch.inference_mode()
    def finish(self) -> Tensor:
        """The ids [0..4] of what is left when the recording ends."""
        config, nothing = self._tokenizer.config, torch.zeros(0, dtype=torch.int64)
        before = len(self.state["fbank"])
        frames = self._with_fbank_of(self.state["samples"])
        context = (config.lfr_window - 1) // 2
        if len(frames) < config.lfr_window or len(frames) == before:
            return nothing
        starts = torch.arange(0, len(frames) - context, config.lfr_stride, device=frames.device)
        index = starts[:, None] + torch.arange(config.lfr_window, device=frames.device)
        return self._encode(frames[index.clamp(max=len(frames) - 1)].flatten(1), 1)

    def _with_fbank_of(self, samples: Tensor) -> Tensor:
        """Frames kept from before, or copies of the first one, and the new ones."""
        values, counts = self._tokenizer.features(samples[None], torch.tensor([len(samples)], device=samples.device))
        new = values[0, : int(counts)]
        before = self.state["fbank"]
        if not len(before) and len(new):
            before = new[:1].expand((self._tokenizer.config.lfr_window - 1) // 2, -1)
        return torch.cat([before, new])

    def _encode(self, stacked: Tensor, num_chunks: int) -> Tensor:
        state, encoder = self.state, self._tokenizer.encoder
        windows = encoder.windows([self._tokenizer.normalise(stacked)], state["overlap"], int(state["num_chunks"]))
        hidden, state["history"] = encoder.run(windows, state["history"])
        state["overlap"] = windows.frames[-1, -self._tokenizer.config.overlap_frames :]
        state["num_chunks"] = state["num_chunks"] + num_chunks
        return self._tokenizer.quantise(hidden).cpu()


class SemanticStream:
    """One recording's way through the semantic tokenizer, piece by piece."""

    def __init__(self, tokenizer: SemanticTokenizer) -> None:
        self._tokenizer = tokenizer
        self._piece = tokenizer.config.piece_tokens * SAMPLES_PER_TOKEN
        self._context = tokenizer.config.context_tokens * SAMPLES_PER_TOKEN
        device = tokenizer.quantizer.codes.device
        # `heard`: how many of the samples at hand belong to earlier pieces.
        self.state: State = {
            "samples": torch.zeros(0, device=device),
            "heard": torch.zeros((), dtype=torch.int64),
        }

    @torch.inference_mode()
    def feed(self, samples: Tensor) -> Tensor:
        """Add [n] samples; the ids [m] int64 of the pieces that are now complete."""
        state = self.state
        state["samples"] = torch.cat([state["samples"], samples])
        ids = [torch.zeros(0, dtype=torch.int64)]
        while len(state["samples"]) - int(state["heard"]) >= self._piece:
            end = int(state["heard"]) + self._piece
            ids.append(self._encode(state["samples"][:end]))
            kept = min(end, self._context)
            state["samples"] = state["samples"][end - kept :]
            state["heard"] = torch.tensor(kept)
        return torch.cat(ids)

    @torch.inference_mode()
    def finish(self) -> Tensor:
        """The ids of the last, shorter piece; none if it has under 480 samples with its context."""
        if len(self.state["samples"]) < max(SHORTEST_PIECE_SAMPLES, int(self.state["heard"]) + 1):
            return torch.zeros(0, dtype=torch.int64)
        return self._encode(self.state["samples"])

    def _encode(self, samples: Tensor) -> Tensor:
        count = torch.tensor([len(samples)], device=samples.device)
        features, num_frames = self._tokenizer.features(samples[None], count)
        ids = self._tokenizer.encode_clips([features[0, : int(num_frames)]])[0]
        return ids[int(self.state["heard"]) // SAMPLES_PER_TOKEN :].cpu()


class SpeechStream:
    """Both tokenizers side by side on one recording.

    On CUDA each has a thread of its own, so that neither waits for the other's kernels to be launched. A CPU's cores
    work on one matrix product together, and two of those at once would only wait for each other.
    """

    def __init__(self, speech: SpeechTokenizer) -> None:
        self._device = speech.device
        self._linguistic = LinguisticStream(speech.linguistic)
        self._semantic = SemanticStream(speech.semantic)
        self._threads = ThreadPoolExecutor(2) if speech.device.type == "cuda" else None

    def feed(self, samples: Tensor) -> SpeechTokens:
        """Add samples and get the codes that are new.

        Args:
            samples: [n] float32, 16 kHz mono, any n.
        """
        samples = samples.to(self._device)
        return self._both(partial(self._linguistic.feed, samples), partial(self._semantic.feed, samples))

    def finish(self) -> SpeechTokens:
        """The recording ends: the codes of what is left. The stream takes no more samples."""
        tokens = self._both(self._linguistic.finish, self._semantic.finish)
        if self._threads is not None:
            self._threads.shutdown()
        return tokens

    def _both(self, linguistic: Callable[[], Tensor], semantic: Callable[[], Tensor]) -> SpeechTokens:
        parts = (linguistic, semantic)
        if self._threads is None:
            ids = [part() for part in parts]
        else:
            ids = [waiting.result() for waiting in [self._threads.submit(part) for part in parts]]
        first, second = (found.numpy().astype(np.int32) for found in ids)
        return SpeechTokens(first, second)

    def state(self) -> State:
        """What the stream remembers; `load_state` of another stream of the same tokenizer goes on from it."""
        parts = {"linguistic": self._linguistic.state, "semantic": self._semantic.state}
        return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.items()}

    def load_state(self, state: State) -> None:
        """Go on from `state`, on whatever device this stream's tokenizer is.

        Raises:
            KeyError: something is missing in it.
        """
        for name, part in (("linguistic", self._linguistic.state), ("semantic", self._semantic.state)):
            for key, value in part.items():
                part[key] = state[f"{name}.{key}"].to(value.device)


class DualStream:
    """A recording's merged token ids, two linguistic and three semantic, group by group (paper 3.1)."""

    def __init__(self, speech: SpeechTokenizer, vocabulary: Vocabulary) -> None:
        self._stream = SpeechStream(speech)
        self._vocabulary = vocabulary
        self._waiting = SpeechTokens(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))

    def feed(self, samples: Tensor) -> NDArray[np.int64]:
        """Add [n] samples, 16 kHz mono; the ids [5 * groups] of the groups that are now whole."""
        return self._merged(self._stream.feed(samples))

    def finish(self) -> NDArray[np.int64]:
        """The ids of the last whole groups; what is left over is dropped, as released."""
        return self._merged(self._stream.finish())

    def state(self) -> State:
        """As `SpeechStream.state`, with the codes that wait for their group."""
        waiting = {
            "waiting.linguistic": torch.from_numpy(self._waiting.linguistic),
            "waiting.semantic": torch.from_numpy(self._waiting.semantic),
        }
        return self._stream.state() | waiting

    def load_state(self, state: State) -> None:
        """As `SpeechStream.load_state`."""
        self._stream.load_state(state)
        self._waiting = SpeechTokens(state["waiting.linguistic"].numpy(), state["waiting.semantic"].numpy())

    def _merged(self, new: SpeechTokens) -> NDArray[np.int64]:
        linguistic = np.concatenate([self._waiting.linguistic, new.linguistic])
        semantic = np.concatenate([self._waiting.semantic, new.semantic])
        groups = num_groups(len(linguistic), len(semantic))
        first, second = groups * LINGUISTIC_PER_GROUP, groups * SEMANTIC_PER_GROUP
        self._waiting = SpeechTokens(linguistic[first:], semantic[second:])
        return merge_streams(linguistic[:first], semantic[:second], self._vocabulary)


def gain_for_peak(peak: float) -> float:
    """The factor by which `SpeechTokenizer.encode` scales a recording whose largest magnitude is `peak`."""
    return PEAK_TARGET / max(peak, PEAK_FLOOR)
