"""Linguistic tokenizer: a SAN-M encoder whose frames are named by their nearest centroid, 16.7 tokens/s (paper 3.1).

The encoder is Paraformer's streaming one, as the released tokenizer runs it: chunks of 4 frames (240 ms), each seen
through a window that holds the 5 frames before it as well. Attention also sees the keys and values that the 4 windows
before computed for their first 4 frames. A window therefore needs nothing but its own frames and, layer by layer, what
earlier windows made of theirs: all windows of a clip, and of many clips in a row, go through the layers together.
Tensor names are those of the state dict that FunASR saves.

Shapes: B clips, T encoder frames (60 ms), D hidden size; N windows of W = overlap + chunk frames, C frames a chunk, L
windows looked back at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.audio.features import kaldi_fbank, length_mask, stack_frames
from stepaudio_train.config.tokenizer import LinguisticConfig
from stepaudio_train.tokenizers.precision import Linear

_NORM_EPS = 1e-12
_TAIL_FRAMES = 2
"""Fbank frames that a chunk's last samples do not complete: a frame is 25 ms long and begins every 10 ms."""
BLOCK_WINDOWS = 128
"""Windows that go through all layers together when nothing is learned: their activations stay in a CPU's cache."""
_BLOCK_MULTIPLE = 32
"""Matrix libraries add up in another order for few rows. With whole multiples of this many windows a clip's ids do not
depend on what else is encoded with it."""


@dataclass(frozen=True)
class Windows:
    """Windows of one or several clips in a row."""

    frames: Tensor
    """[N, W, input]: scaled, positions added; zeros in front of a clip's first frame and behind its last."""
    index: Tensor
    """[N] int64: number of the window within its clip, from 0."""
    num_new: Tensor
    """[N] int64: frames of the window's chunk that are the clip's own, 1..C."""

    def block(self, start: int, stop: int) -> Windows:
        """Windows start to stop - 1."""
        return Windows(self.frames[start:stop], self.index[start:stop], self.num_new[start:stop])


class SANMAttention(nn.Module):
    """Self-attention plus a memory block: a depthwise convolution over the values (SAN-M)."""

    def __init__(self, input_size: int, hidden_size: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_q_k_v = Linear(input_size, 3 * hidden_size)
        self.linear_out = Linear(hidden_size, hidden_size)
        self.fsmn_block = nn.Conv1d(
            hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size, bias=False
        )

    def forward(self, x: Tensor, inside: Tensor, seen: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Attend within windows and back.

        Args:
            x: [N, W, input]; inside: [N, W, 1], 0 behind a clip's end, else 1; seen: [N, 1, 1, L * C + W] additive
                mask; kept: [2, L, C, D] of the windows before the first.

        Returns:
            [N, W, D], and what the window after the last needs to be kept.
        """
        look_back, chunk = kept.shape[1:3]
        query, key, value = self.linear_q_k_v(x).chunk(3, dim=-1)
        earlier = torch.cat([kept.to(key.dtype), torch.stack([key[:, :chunk], value[:, :chunk]])], dim=1)
        # [2, N, L, C, D]: for every window the L before it; the last L of all are for the windows to come.
        back = earlier.unfold(1, look_back, 1)[:, : len(x)].movedim(-1, 2).flatten(2, 3)
        keys, values = torch.cat([back[0], key], dim=1), torch.cat([back[1], value], dim=1)
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, keys, values)]
        context = F.scaled_dot_product_attention(*heads, attn_mask=seen.to(query.dtype))
        own = value.float() * inside
        memory = _depthwise(own, self.fsmn_block.weight) + own
        return self.linear_out(context.transpose(1, 2).flatten(2)) + memory, earlier[:, -look_back:]


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.w_1 = Linear(hidden_size, ffn_size)
        self.w_2 = Linear(ffn_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.relu(self.w_1(x)))


class SANMLayer(nn.Module):
    """One pre-norm layer. Where input and hidden size differ, attention has no residual path (the first layer)."""

    def __init__(self, input_size: int, config: LinguisticConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn = SANMAttention(input_size, size, config.num_heads, config.kernel_size)
        self.feed_forward = FeedForward(size, config.ffn_size)
        self.norm1 = nn.LayerNorm(input_size, eps=_NORM_EPS)
        self.norm2 = nn.LayerNorm(size, eps=_NORM_EPS)
        self.residual = input_size == size

    def forward(self, x: Tensor, inside: Tensor, seen: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As `SANMAttention.forward`."""
        attended, kept = self.self_attn(self.norm1(x), inside, seen, kept)
        x = x + attended if self.residual else attended
        return x + self.feed_forward(self.norm2(x)), kept


class SANMEncoder(nn.Module):
    """Paraformer's streaming encoder."""

    def __init__(self, config: LinguisticConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders0 = nn.ModuleList([SANMLayer(config.input_size, config)])
        self.encoders = nn.ModuleList([SANMLayer(config.hidden_size, config) for _ in range(config.num_blocks - 1)])
        self.after_norm = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Whole clips: stacked and normalised frames x [B, T, input], lengths [B] -> [B, T, D]; zero past the end."""
        clips = [row[:length] for row, length in zip(x, lengths.tolist(), strict=True)]
        frames, _ = self.run(self.windows(clips), self.history())
        inside = length_mask(lengths, x.shape[1])
        return torch.zeros(*x.shape[:2], frames.shape[-1], device=x.device, dtype=frames.dtype).masked_scatter(
            inside[:, :, None], frames
        )

    def windows(self, clips: Sequence[Tensor], overlap: Tensor | None = None, num_earlier: int = 0) -> Windows:
        """Cut clips [T_i, input] into windows.

        Args:
            overlap: [overlap, input], the prepared frames before the one clip, where it goes on from an earlier part;
                num_earlier: windows of that part.
        """
        chunk, overlap_frames = self.config.chunk_frames, self.config.overlap_frames
        longest = max((len(clip) for clip in clips), default=0)
        first = num_earlier * chunk
        positions = _sinusoids(first, first + longest, self.config.input_size, self.after_norm.weight.device)
        scale = math.sqrt(self.config.hidden_size)
        cut, index, num_new = [], [], []
        for clip in clips:
            if not len(clip):
                continue
            number = -(-len(clip) // chunk)
            prepared = torch.addcmul(positions[: len(clip)], clip, clip.new_tensor(scale))
            padded = F.pad(prepared, (0, 0, overlap_frames if overlap is None else 0, number * chunk - len(clip)))
            if overlap is not None:
                padded = torch.cat([overlap, padded])
            cut.append(padded.unfold(0, overlap_frames + chunk, chunk).transpose(1, 2))
            index.append(torch.arange(num_earlier, num_earlier + number))
            num_new.append(torch.tensor([chunk] * (number - 1) + [len(clip) - (number - 1) * chunk]))
        if not cut:
            empty = torch.zeros(0, dtype=torch.int64, device=positions.device)
            return Windows(positions.new_zeros(0, overlap_frames + chunk, self.config.input_size), empty, empty)
        device = positions.device
        return Windows(torch.cat(cut), torch.cat(index).to(device), torch.cat(num_new).to(device))

    def history(self) -> Tensor:
        """What attention keeps of the last L windows, keys and values [layers, 2, L, C, D]; zeros at the beginning."""
        config = self.config
        size = (config.num_blocks, 2, config.look_back_chunks, config.chunk_frames, config.hidden_size)
        return self.after_norm.weight.new_zeros(size)

    def run(self, windows: Windows, history: Tensor) -> tuple[Tensor, Tensor]:
        """Windows in a row through all layers.

        Returns:
            Hidden frames of the windows' chunks, [sum of num_new, D], and the history of the windows to come.
        """
        chunk = self.config.chunk_frames
        inside, seen = self._masks(windows)
        x, kept = windows.frames, []
        for layer, before in zip((*self.encoders0, *self.encoders), history, strict=True):
            x, after = layer(x, inside, seen, before)
            kept.append(after)
        new = length_mask(windows.num_new, chunk)
        return self.after_norm(x[:, -chunk:][new]), torch.stack(kept)

    def _masks(self, windows: Windows) -> tuple[Tensor, Tensor]:
        """What is inside the clip [N, W, 1], and the additive mask over looked-back and own frames [N, 1, 1, L*C+W]."""
        config = self.config
        own = length_mask(config.overlap_frames + windows.num_new, config.overlap_frames + config.chunk_frames)
        # The window j places before exists if this one is at least the clip's j-th; rows lie oldest first.
        ages = torch.arange(config.look_back_chunks, 0, -1, device=own.device)
        back = (windows.index[:, None] >= ages).repeat_interleave(config.chunk_frames, dim=1)
        visible = torch.cat([back, own], dim=1)
        seen = torch.zeros(visible.shape, device=own.device).masked_fill(~visible, -torch.inf)
        return own[:, :, None].float(), seen[:, None, None]


class LinguisticTokenizer(nn.Module):
    """From 16 kHz samples to the ids of the nearest centroids, one for every 6 fbank frames."""

    cmvn_shift: Tensor
    cmvn_scale: Tensor
    centroids: Tensor

    def __init__(self, config: LinguisticConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SANMEncoder(config)
        self.register_buffer("cmvn_shift", torch.zeros(config.input_size))
        self.register_buffer("cmvn_scale", torch.ones(config.input_size))
        self.register_buffer("centroids", torch.zeros(config.codebook_size, config.hidden_size))

    def features(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N] samples -> fbank [B, frames, mel bins] in nats, and frame counts [B]."""
        return kaldi_fbank(waveforms, num_samples, self.config.num_mel_bins)

    def stack(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Fbank -> low-frame-rate frames [B, T, input], before mean and variance normalisation, and counts [B]."""
        stacked, _ = stack_frames(features, num_frames, self.config.lfr_window, self.config.lfr_stride)
        counts = num_encoder_frames(num_frames, self.config)
        stacked = stacked[:, : int(counts.max())]
        return stacked * length_mask(counts, stacked.shape[1])[:, :, None], counts

    def normalise(self, stacked: Tensor) -> Tensor:
        """Mean and variance normalisation of stacked frames [..., input]; what the encoder takes."""
        return (stacked + self.cmvn_shift) * self.cmvn_scale

    def encode_features(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Fbank -> encoder output [B, T, D] and counts [B]; what the centroids are compared with."""
        stacked, counts = self.stack(features, num_frames)
        return self.encoder(self.normalise(stacked), counts), counts

    def quantise(self, hidden: Tensor) -> Tensor:
        """[..., D] -> ids [...] int64 of the nearest centroids (Euclidean)."""
        return nearest(hidden, self.centroids)

    @torch.inference_mode()
    def encode_clips(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Ids [T_i] int64 of clips given by their whole fbank [frames_i, mel bins], of any lengths.

        Windows go through the encoder `BLOCK_WINDOWS` at a time: what the layers hold does not grow with the clips.
        """
        clips = []
        for clip in features:
            stacked, counts = self.stack(clip[None], torch.tensor([len(clip)], device=clip.device))
            clips.append(self.normalise(stacked[0, : int(counts)]))
        windows, history = self.encoder.windows(clips), self.encoder.history()
        ids = []
        for start in range(0, len(windows.index), BLOCK_WINDOWS):
            block = windows.block(start, start + BLOCK_WINDOWS)
            hidden, history = self.encoder.run(_filled(block), history)
            ids.append(self.quantise(hidden[: int(block.num_new.sum())]))
        lengths = [len(clip) for clip in clips]
        return list(torch.cat(ids).split(lengths)) if ids else [clip.new_zeros(0, dtype=torch.int64) for clip in clips]

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, T] int64 and how many of them are the clip's own [B].

        Args:
            waveforms: [B, N] float32, 16 kHz, peak-normalised, zero-padded; num_samples: [B] int64.
        """
        features, num_frames = self.features(waveforms, num_samples)
        ids = self.encode_clips([row[:count] for row, count in zip(features, num_frames.tolist(), strict=True)])
        return nn.utils.rnn.pad_sequence(ids, batch_first=True), num_encoder_frames(num_frames, self.config)


def num_encoder_frames(num_fbank_frames: Tensor, config: LinguisticConfig) -> Tensor:
    """Encoder frames, and so tokens, that the released streaming front end makes of fbank frames.

    Chunks of 240 ms (24 fbank frames) give 4 each. What is left behind the last whole chunk gives one for every 6
    fbank frames or part of them, unless it completes fewer than 6 (4 where there is no chunk before), which give none.
    Samples that complete no fbank frame give nothing either, so a clip's count follows from its fbank frames alone.
    """
    stride, context = config.lfr_stride, (config.lfr_window - 1) // 2
    chunk = config.chunk_frames * stride
    whole = (num_fbank_frames + _TAIL_FRAMES) // chunk
    left = num_fbank_frames - (whole * chunk - _TAIL_FRAMES).clamp(min=0)
    # One frame is kept from the chunk before; at the very beginning `context` copies of the first stand in.
    waiting = torch.where(whole > 0, 1, context)
    last = torch.where(left + waiting < config.lfr_window, 0, -(-(left + waiting - context) // stride))
    return whole * config.chunk_frames + last * (left > 0)


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest row of centroids [K, D] for each of points [..., D]; the lowest index among equals."""
    scores = points @ centroids.T - centroids.square().sum(1) / 2
    return scores.argmax(dim=-1)


def _filled(block: Windows) -> Windows:
    """The block with windows of zeros behind it, up to a whole multiple; what they give is left out again."""
    missing = -len(block.index) % _BLOCK_MULTIPLE
    if not missing:
        return block
    return Windows(
        F.pad(block.frames, (0, 0, 0, 0, 0, missing)),
        F.pad(block.index, (0, missing)),
        F.pad(block.num_new, (0, missing), value=1),
    )


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each channel of x [N, W, D] over time with its own taps, weight [D, 1, odd K]; same length.

    A sum of shifted products: on a CPU faster than torch's grouped convolution, and windows are shorter than the taps.
    """
    taps = weight[:, 0].T
    middle = len(taps) // 2
    total = x * taps[middle]
    for shift in range(1, min(middle, x.shape[1] - 1) + 1):
        total[:, :-shift].addcmul_(x[:, shift:], taps[middle + shift])
        total[:, shift:].addcmul_(x[:, :-shift], taps[middle - shift])
    return total


def _sinusoids(start: int, stop: int, depth: int, device: torch.device) -> Tensor:
    """[stop - start, depth] encoding of frames start..stop-1; positions count from 1, sines fill the first half."""
    half = depth // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / (half - 1)))
    angles = torch.arange(start + 1, stop + 1, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
