"""Speech tokens of recordings, encoded once and kept in files: a second start finds them.

FOLDER/HASH.safetensors       codes of up to BLOCK_RECORDINGS recordings, written whole
FOLDER/refused-RANK.json      recordings that could not be read, and why

A recording is known by its path, size and time of change and by the tokenizer's files, so what has changed is encoded
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio import AudioError, read_audio
from stepaudio_train.data.files import replacing, write_atomically
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens, tokenizer_files

BLOCK_RECORDINGS = 256
BATCH_AUDIO_S = 120.0
"""Encoded at once, and the recording that goes over it."""
_LINGUISTIC, _SEMANTIC = "linguistic", "semantic"


class SpeechCache:
    """The codes of one speech tokenizer in one folder."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._made_by = "|".join(_version(path) for path in tokenizer_files(tokenizer))

    def encode(
        self, recordings: Sequence[Path], share: tuple[int, int] = (0, 1), device: str = "auto", progress: bool = False
    ) -> None:
        """Encode this process's share of the recordings that are not there yet. All of them must be files.

        Args:
            share: (rank, number of processes that call this with the same recordings).

        Raises:
            TokenizerError: the tokenizer cannot be used.
        """
        # Neighbours of like size make batches of little padding, and equal shares for the processes. What is there
        # already is left out behind the division: another process may be writing its share, and none may slip between.
        ordered = sorted(dict.fromkeys(recordings), key=lambda path: (path.stat().st_size, str(path)))
        rank, num_processes = share
        known = self._codes()
        own = [path for path in ordered[rank::num_processes] if self._key(path) not in known]
        refused: dict[str, str] = {}
        if own:
            tokenizer = SpeechTokenizer.from_directory(self._tokenizer, device)
            with tqdm(total=len(own), unit="recording", desc="encode", disable=not progress, dynamic_ncols=True) as bar:
                for start in range(0, len(own), BLOCK_RECORDINGS):
                    block = own[start : start + BLOCK_RECORDINGS]
                    self._write(self._encoded(tokenizer, block, refused, bar))
        content = json.dumps(refused, ensure_ascii=False, indent=1).encode()
        write_atomically(self._folder / f"refused-{rank:05d}.json", content)

    def look_up(self, recordings: Sequence[Path]) -> tuple[dict[Path, SpeechTokens], dict[Path, str]]:
        """Codes of the recordings that have been encoded, and for the others the reason why not."""
        known = self._codes()
        refused: dict[str, str] = {}
        for path in sorted(self._folder.glob("refused-*.json")):
            refused |= json.loads(path.read_text(encoding="utf-8"))
        codes, reasons = {}, {}
        for path in dict.fromkeys(recordings):
            key = self._key(path)
            if key in known:
                codes[path] = known[key]
            else:
                reasons[path] = refused.get(key, f"{path}: has not been encoded")
        return codes, reasons

    def _key(self, recording: Path) -> str:
        return hashlib.sha256(f"{self._made_by}|{_version(recording)}".encode()).hexdigest()[:32]

    def _codes(self) -> dict[str, SpeechTokens]:
        found: dict[str, SpeechTokens] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            tensors = load_file(path)
            for name in tensors:
                key, kind = name.split("/")
                if kind == _LINGUISTIC:
                    found[key] = SpeechTokens(tensors[name], tensors[f"{key}/{_SEMANTIC}"])
        return found

    def _encoded(
        self, tokenizer: SpeechTokenizer, block: Sequence[Path], refused: dict[str, str], bar: tqdm
    ) -> dict[str, SpeechTokens]:
        encoded: dict[str, SpeechTokens] = {}
        waveforms: dict[Path, Tensor] = {}
        for number, path in enumerate(block, 1):
            try:
                waveforms[path] = read_audio(path, tokenizer.sample_rate_hz)
            except AudioError as error:
                refused[self._key(path)] = str(error)
            num_samples = sum(len(waveform) for waveform in waveforms.values())
            if num_samples >= BATCH_AUDIO_S * tokenizer.sample_rate_hz or (waveforms and number == len(block)):
                with torch.inference_mode():
                    tokens = tokenizer.encode(list(waveforms.values()))
                encoded |= {self._key(path): codes for path, codes in zip(waveforms, tokens, strict=True)}
                waveforms.clear()
            bar.update()
        return encoded

    def _write(self, encoded: dict[str, SpeechTokens]) -> None:
        if not encoded:
            return
        tensors: dict[str, np.ndarray] = {}
        for key, codes in encoded.items():
            tensors |= {f"{key}/{_LINGUISTIC}": codes.linguistic, f"{key}/{_SEMANTIC}": codes.semantic}
        name = hashlib.sha256("".join(sorted(encoded)).encode()).hexdigest()[:16]
        with replacing(self._folder / f"{name}.safetensors") as temporary:
            save_file(tensors, temporary)


def _version(path: Path) -> str:
    state = path.stat()
    return f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
