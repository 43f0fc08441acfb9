"""Both speech tokenizers behind one door: recordings in, two streams of codes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from stepaudio_train.audio import peak_normalise
from stepaudio_train.audio.features import (
    FRAME_SHIFT,
    KALDI_FRAME,
    SAMPLE_RATE_HZ,
    Features,
    batches_of_like_length,
    num_kaldi_frames,
    pad_clips,
)
from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig, piece_problem
from stepaudio_train.tokenizers.dual import TOKENS_PER_GROUP, audio_text_to_ids, split_streams
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.precision import Precision, set_precision
from stepaudio_train.tokenizers.released import CENTROIDS_FILE, is_released, read_released
from stepaudio_train.tokenizers.semantic import SAMPLES_PER_TOKEN, SemanticTokenizer
from stepaudio_train.tokenizers.vocabulary import AUDIO_IDS
from stepaudio_train.tokenizers.weight_files import (
    LINGUISTIC_FILE,
    SEMANTIC_FILE,
    SETTINGS_FILE,
    TokenizerError,
    load_weights,
    save_settings,
    save_weights,
)

SHORTEST_PIECE_SAMPLES = 480
"""A piece shorter than this, its context included, gives no semantic codes, as released."""
_SEGMENT_FRAMES = 3000
_BATCH_SAMPLES = 60 * SAMPLE_RATE_HZ


@dataclass(frozen=True)
class SpeechTokens:
    """Codes of one recording, counted from 0 in each codebook."""

    linguistic: NDArray[np.int32]
    """[L], 16.7 a second."""
    semantic: NDArray[np.int32]
    """[S], 25 a second."""

    @classmethod
    def from_text(cls, text: str) -> SpeechTokens:
        """The codes of a text of `<audio_k>`, as `audio_ids_to_text` writes it.

        Raises:
            ValueError: anything else in it, or no whole groups of two linguistic and three semantic tokens.
        """
        ids = audio_text_to_ids(text, AUDIO_IDS)
        linguistic, semantic = split_streams(ids, AUDIO_IDS)
        if not len(ids) or len(ids) % TOKENS_PER_GROUP:
            raise ValueError(
                f"{len(ids)} tokens are no whole number of groups: give two linguistic and three semantic in turn"
            )
        return cls(linguistic.astype(np.int32), semantic.astype(np.int32))


class SpeechTokenizer:
    """The dual-codebook tokenizer of the paper's section 3.1, before merging (`tokenizers/dual.py`)."""

    def __init__(
        self,
        linguistic: LinguisticTokenizer,
        semantic: SemanticTokenizer,
        device: str = "auto",
        precision: Precision = "fp32",
    ) -> None:
        """
        Args:
            precision: bf16 runs the layers' matrix products in bf16: faster where the processor has such
                instructions, with a small share of other ids (docs/tokenizer.md has figures).
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.linguistic = linguistic.to(self.device).eval()
        self.semantic = semantic.to(self.device).eval()
        for part in (self.linguistic, self.semantic):
            set_precision(part, precision)

    @property
    def sample_rate_hz(self) -> int:
        """What `encode` takes."""
        return SAMPLE_RATE_HZ

    @classmethod
    def from_directory(
        cls, directory: str | Path, device: str = "auto", precision: Precision = "fp32"
    ) -> SpeechTokenizer:
        """Read what `save` or a tokenizer recipe wrote, or a directory laid out as the released Step-Audio-Tokenizer.

        Raises:
            TokenizerError: no tokenizer there, or settings or weights that do not fit.
        """
        directory = Path(directory)
        if is_released(directory):
            return cls(*read_released(directory), device, precision)
        settings_file = directory / SETTINGS_FILE
        if not settings_file.is_file():
            raise TokenizerError(
                f"{directory}: holds neither {SETTINGS_FILE} nor {CENTROIDS_FILE}; give a run_dir of `stepaudio run "
                "tokenizer` or a copy of Step-Audio-Tokenizer"
            )
        try:
            settings = json.loads(settings_file.read_text(encoding="utf-8"))
            linguistic = TypeAdapter(LinguisticConfig).validate_python(settings["linguistic"])
            semantic = TypeAdapter(SemanticConfig).validate_python(settings["semantic"])
        except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
            raise TokenizerError(f"{settings_file}: is no speech tokenizer's settings: {error}") from error
        modules = LinguisticTokenizer(linguistic), SemanticTokenizer(semantic)
        for module, name in zip(modules, (LINGUISTIC_FILE, SEMANTIC_FILE), strict=True):
            load_weights(module, directory / name)
        return cls(*modules, device, precision)

    def with_pieces(self, piece_tokens: int, context_tokens: int) -> SpeechTokenizer:
        """The same weights with another rule for the semantic pieces (`SemanticConfig`): short ones can be streamed.

        The ids differ from those of other rules; a model should be trained on the rule that it is served with.

        Raises:
            ValueError: a piece with its context is empty, or longer than the encoder's positions.
        """
        config = replace(self.semantic.config, piece_tokens=piece_tokens, context_tokens=context_tokens)
        if problem := piece_problem(config):
            raise ValueError(problem)
        semantic = SemanticTokenizer(config)
        semantic.encoder, semantic.quantizer = self.semantic.encoder, self.semantic.quantizer
        return SpeechTokenizer(self.linguistic, semantic, str(self.device))

    def save(self, directory: str | Path) -> None:
        """Write settings and weights into `directory`, which is made if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_weights(self.linguistic, directory / LINGUISTIC_FILE)
        save_weights(self.semantic, directory / SEMANTIC_FILE)
        # Written last: a directory with settings is whole.
        save_settings(directory, self.linguistic.config, self.semantic.config)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Tensor], peak_norm: bool = True) -> list[SpeechTokens]:
        """Codes of recordings of any lengths; each one's are what it would get alone.

        Args:
            waveforms: [samples] float32 each, 16 kHz mono.
            peak_norm: bring each to a peak of 0.999 first, as released.

        Returns:
            One `SpeechTokens` a recording. Recordings under 55 ms have no linguistic codes, under 30 ms no semantic.

        Raises:
            ValueError: a waveform that is not one-dimensional float.
        """
        for index, waveform in enumerate(waveforms):
            if waveform.ndim != 1 or not waveform.is_floating_point():
                shape = tuple(waveform.shape)
                raise ValueError(f"waveform {index}: expected [samples] of floats, got {shape} of {waveform.dtype}")
        clips = [w.float() for w in waveforms]
        if peak_norm:
            clips = [peak_normalise(clip) if len(clip) else clip for clip in clips]
        clips = [clip.to(self.device) for clip in clips]
        linguistic = self.linguistic.encode_clips(self._fbank(clips))
        semantic = self._semantic(clips)
        return [SpeechTokens(_as_codes(x), _as_codes(y)) for x, y in zip(linguistic, semantic, strict=True)]

    def _fbank(self, clips: list[Tensor]) -> list[Tensor]:
        """Fbank [frames, mel bins] of each clip; long clips are analysed in segments, which changes nothing."""
        cuts = [fbank_segments(clip) for clip in clips]
        parts = iter(_analysed([segment for cut in cuts for segment in cut], self.linguistic.features))
        return [torch.cat(list(islice(parts, len(cut)))) for cut in cuts]

    def _semantic(self, clips: list[Tensor]) -> list[Tensor]:
        cuts = [semantic_pieces(len(clip), self.semantic.config) for clip in clips]
        pieces = [clip[cut.begin : cut.stop] for clip, found in zip(clips, cuts, strict=True) for cut in found]
        encoded = iter(self.semantic.encode_clips(_analysed(pieces, self.semantic.features)))
        nothing = torch.zeros(0, dtype=torch.int64)
        return [torch.cat([nothing, *(next(encoded)[cut.context_tokens :].cpu() for cut in found)]) for found in cuts]


def tokenizer_files(directory: Path) -> list[Path]:
    """The files that decide about a speech tokenizer's codes, released or trained here, in order."""
    weights = (".safetensors", ".onnx", ".npy", ".pt", ".mvn", ".yaml")
    return sorted(p for p in directory.rglob("*") if p.suffix in weights or p.name == SETTINGS_FILE)


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording that the semantic tokenizer hears at once, in samples."""

    begin: int
    """Where it hears from."""
    stop: int
    context_tokens: int
    """Of its tokens, how many belong to the piece before."""


def semantic_pieces(num_samples: int, config: SemanticConfig) -> list[Piece]:
    """The pieces of a recording. As released, one that is heard for under 480 samples in all gives no tokens."""
    length, context = config.piece_tokens * SAMPLES_PER_TOKEN, config.context_tokens * SAMPLES_PER_TOKEN
    pieces = []
    for start in range(0, num_samples, length):
        stop = min(start + length, num_samples)
        begin = max(0, start - context)
        if stop - begin >= SHORTEST_PIECE_SAMPLES:
            pieces.append(Piece(begin, stop, (start - begin) // SAMPLES_PER_TOKEN))
    return pieces


def fbank_segments(clip: Tensor) -> list[Tensor]:
    """Segments whose fbank frames, one after the other, are those of the clip."""
    frames = int(num_kaldi_frames(torch.tensor(len(clip))))
    starts = range(0, max(1, frames), _SEGMENT_FRAMES)
    overlap = KALDI_FRAME - FRAME_SHIFT
    return [clip[start * FRAME_SHIFT : (start + _SEGMENT_FRAMES) * FRAME_SHIFT + overlap] for start in starts]


def _analysed(clips: list[Tensor], features: Features) -> list[Tensor]:
    """Features [T_i, M] of each clip, computed in batches of clips of like length."""
    found: list[Tensor] = [torch.empty(0)] * len(clips)
    for batch in batches_of_like_length([len(clip) for clip in clips], _BATCH_SAMPLES):
        values, counts = features(*pad_clips([clips[index] for index in batch]))
        for index, row, count in zip(batch, values, counts.tolist(), strict=True):
            found[index] = row[:count]
    return found


def _as_codes(ids: Tensor) -> NDArray[np.int32]:
    return ids.cpu().numpy().astype(np.int32)
