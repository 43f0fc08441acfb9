"""Both speech tokenizers behind one door: recordings in, two streams of codes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepaudio_train.audio import peak_normalise
from stepaudio_train.audio.features import KALDI_FRAME, SAMPLE_RATE_HZ, pad_clips
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer

SETTINGS_FILE = "speech_tokenizer.json"
LINGUISTIC_FILE = "linguistic.safetensors"
SEMANTIC_FILE = "semantic.safetensors"
PIECE_SAMPLES = 30 * SAMPLE_RATE_HZ
"""The semantic tokenizer takes long recordings in pieces of this many samples, without overlap, as released."""
SHORTEST_PIECE_SAMPLES = 480
"""A last piece shorter than this gives no semantic codes, as released."""


@dataclass(frozen=True)
class SpeechTokens:
    """Codes of one recording, counted from 0 in each codebook."""

    linguistic: NDArray[np.int32]
    """[L], 16.7 a second."""
    semantic: NDArray[np.int32]
    """[S], 25 a second."""


class TokenizerError(UserError, ValueError):
    """A speech tokenizer's files cannot be used. The message names the file."""


class SpeechTokenizer:
    """The dual-codebook tokenizer of the paper's section 3.1, before merging (`tokenizers/dual.py`)."""

    def __init__(self, linguistic: LinguisticTokenizer, semantic: SemanticTokenizer, device: str = "auto") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.linguistic = linguistic.to(self.device).eval()
        self.semantic = semantic.to(self.device).eval()

    @property
    def sample_rate_hz(self) -> int:
        """What `encode` takes."""
        return SAMPLE_RATE_HZ

    @classmethod
    def from_directory(cls, directory: str | Path, device: str = "auto") -> SpeechTokenizer:
        """Read what `save` or the tokenizer recipe wrote.

        Raises:
            TokenizerError: no tokenizer there, or settings or weights that do not fit.
        """
        directory = Path(directory)
        settings_file = directory / SETTINGS_FILE
        if not settings_file.is_file():
            raise TokenizerError(f"{directory}: holds no {SETTINGS_FILE}; give a run_dir of `stepaudio run tokenizer`")
        try:
            settings = json.loads(settings_file.read_text(encoding="utf-8"))
            linguistic = TypeAdapter(LinguisticConfig).validate_python(settings["linguistic"])
            semantic = TypeAdapter(SemanticConfig).validate_python(settings["semantic"])
        except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
            raise TokenizerError(f"{settings_file}: is no speech tokenizer's settings: {error}") from error
        modules = LinguisticTokenizer(linguistic), SemanticTokenizer(semantic)
        for module, name in zip(modules, (LINGUISTIC_FILE, SEMANTIC_FILE), strict=True):
            load_weights(module, directory / name)
        return cls(*modules, device)

    def save(self, directory: str | Path) -> None:
        """Write settings and weights into `directory`, which is made if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_weights(self.linguistic, directory / LINGUISTIC_FILE)
        save_weights(self.semantic, directory / SEMANTIC_FILE)
        # Written last: a directory with settings is whole.
        save_settings(directory, self.linguistic.config, self.semantic.config)

    def encode(self, waveforms: Sequence[Tensor]) -> list[SpeechTokens]:
        """Codes of a batch of recordings; each clip's are what it would get alone. Fastest with similar lengths.

        Args:
            waveforms: [samples] float32 each, 16 kHz mono, any level: the peak is normalised here, as released.

        Returns:
            One `SpeechTokens` a recording. Recordings under 25 ms have no linguistic codes, under 30 ms no semantic.

        Raises:
            ValueError: a waveform that is not one-dimensional float.
        """
        for index, waveform in enumerate(waveforms):
            if waveform.ndim != 1 or not waveform.is_floating_point():
                shape = tuple(waveform.shape)
                raise ValueError(f"waveform {index}: expected [samples] of floats, got {shape} of {waveform.dtype}")
        levelled = [peak_normalise(w.float()) if len(w) else w.float() for w in waveforms]
        linguistic = self._run(self.linguistic, levelled, KALDI_FRAME)
        pieces = [list(w.split(PIECE_SAMPLES)) if len(w) else [w] for w in levelled]
        semantic = iter(self._run(self.semantic, [p for clip in pieces for p in clip], SHORTEST_PIECE_SAMPLES))
        return [
            SpeechTokens(codes, np.concatenate([next(semantic) for _ in clip]))
            for codes, clip in zip(linguistic, pieces, strict=True)
        ]

    def _run(
        self, module: LinguisticTokenizer | SemanticTokenizer, clips: list[Tensor], shortest: int
    ) -> list[NDArray[np.int32]]:
        codes: list[NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)] * len(clips)
        usable = [index for index, clip in enumerate(clips) if len(clip) >= shortest]
        if usable:
            waveforms, num_samples = pad_clips([clips[index].to(self.device) for index in usable])
            ids, counts = module(waveforms, num_samples)
            for index, row, count in zip(usable, ids.cpu().numpy(), counts.tolist(), strict=True):
                codes[index] = row[:count].astype(np.int32)
        return codes


def save_settings(directory: Path, linguistic: LinguisticConfig, semantic: SemanticConfig) -> None:
    """Write the sizes of both tokenizers, which `SpeechTokenizer.from_directory` builds them from."""
    settings = {"linguistic": asdict(linguistic), "semantic": asdict(semantic)}
    (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_weights(module: LinguisticTokenizer | SemanticTokenizer, path: Path) -> None:
    """Write a tokenizer's state dict as safetensors, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}, temporary)
    temporary.replace(path)


def load_weights(module: LinguisticTokenizer | SemanticTokenizer, path: Path) -> None:
    """Read what `save_weights` wrote into a module of the same sizes.

    Raises:
        TokenizerError: missing or broken file, or other sizes.
    """
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TokenizerError(f"{path}: cannot be loaded into this tokenizer: {error}") from error
