"""`stepaudio export tokenizer`: the speech tokenizer as the directory that StepFun's code takes, and a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stepaudio_train.audio.features import log_mel, normalise_log_mel
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.errors import UserError
from stepaudio_train.tokenizers.released import is_released, write_released
from stepaudio_train.tokenizers.released.directory import ONNX_FILE
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens

_TEST_LENGTHS = (8000, 50000, 100000)


@dataclass(frozen=True)
class ExportOptions:
    """What `stepaudio export tokenizer` is asked for."""

    source: Path
    """Any directory that holds a speech tokenizer."""
    destination: Path
    released: Path | None = None
    """A released directory, whose other parts are taken over."""


def export_tokenizer(options: ExportOptions) -> int:
    """Write the directory, read it again and compare ids; 1 if any differ.

    Raises:
        UserError: no tokenizer in the source, or one that the released code cannot run.
    """
    other_parts = options.released
    if other_parts is None and is_released(options.source):
        other_parts = options.source
    if other_parts is not None and not is_released(other_parts):
        raise UserError(f"{other_parts}: is no released Step-Audio-Tokenizer directory")
    before = SpeechTokenizer.from_directory(options.source, "cpu")
    write_released(before.linguistic, before.semantic, options.destination, other_parts)
    after = SpeechTokenizer.from_directory(options.destination, "cpu")
    clips = [speech_like(length, seed=length) for length in _TEST_LENGTHS]
    wanted = before.encode(clips, peak_norm=False)
    checks = {"read again": _different(wanted, after.encode(clips, peak_norm=False))}
    checks["ONNX Runtime"] = _different_in_onnx_runtime(wanted, clips, after, options.destination / ONNX_FILE)
    _show(options.destination, checks, sum(len(t.linguistic) + len(t.semantic) for t in wanted))
    return 1 if any(checks.values()) else 0


def _different(wanted: list[SpeechTokens], found: list[SpeechTokens]) -> int:
    return sum(
        int((one.linguistic != other.linguistic).sum() + (one.semantic != other.semantic).sum())
        for one, other in zip(wanted, found, strict=True)
    )


def _different_in_onnx_runtime(
    wanted: list[SpeechTokens], clips: list[Tensor], tokenizer: SpeechTokenizer, path: Path
) -> int:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feats, length = (given.name for given in session.get_inputs())
    different = 0
    for tokens, clip in zip(wanted, clips, strict=True):
        mel, num_frames = log_mel(clip[None], torch.tensor([len(clip)]), tokenizer.semantic.config.num_mel_bins)
        mel = normalise_log_mel(mel, num_frames).transpose(1, 2)
        (ids,) = session.run(None, {feats: mel.numpy(), length: num_frames.int().numpy()})
        different += int((np.asarray(ids).flatten() != tokens.semantic).sum())
    return different


def _files(directory: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix(), path.stat().st_size


def _show(directory: Path, checks: dict[str, int], num_ids: int) -> None:
    show_files(directory)
    console = Console()
    for name, different in checks.items():
        if different:
            console.print(f"{name}: {different} ids differ")
        else:
            console.print(f"{name}: ids equal ({num_ids} in all)")


def show_files(directory: Path) -> None:
    """Print the files of an exported directory with their sizes."""
    table = Table("file", "bytes", title=str(directory))
    for name, size in _files(directory):
        table.add_row(name, f"{size:,}")
    Console().print(table)
