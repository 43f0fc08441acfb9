"""`stepaudio export decoder`: the speech decoder as the directory that StepFun's code takes, and a comparison."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.commands.export import show_files
from stepaudio_train.models.decoder.flow_files import NoSpeaker, speaker_file
from stepaudio_train.models.decoder.released import writing_released_decoder
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.tokenizers.dual import LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP
from stepaudio_train.tokenizers.released import write_released
from stepaudio_train.tokenizers.released.directory import ONNX_FILE
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens

_TEST_GROUPS = 5
_TEST_SAMPLES = 16000
_VOICE_TOLERANCE = 1e-3
"""Largest difference of a voice's vector, over its length, that another runtime may make."""


@dataclass(frozen=True)
class DecoderExportOptions:
    """What `stepaudio export decoder` is asked for."""

    source: Path
    """A run of `stepaudio run flow`, or a released directory."""
    destination: Path
    vocoder: Path | None = None
    """A run of `stepaudio run vocoder`, or a released directory; None: `source`."""
    speech_tokenizer: Path | None = None
    """The speech tokenizer whose semantic part is put beside the decoder; None: that of a released source."""


def export_decoder(options: DecoderExportOptions) -> int:
    """Write the directory, read it again and compare what both make; 1 if it differs.

    Raises:
        UserError: no decoder in the sources, or one that the released code cannot run.
    """
    before = SpeechDecoder.from_directory(options.source, options.vocoder, device="cpu")
    tokenizer = options.speech_tokenizer
    if tokenizer is None and (options.source / ONNX_FILE).is_file():
        tokenizer = options.source
    speaker = _speaker(options.source, before)
    writing = writing_released_decoder(before.flow, before.solver, before.vocoder, speaker, options.destination)
    with writing as folder:
        if tokenizer is not None:
            _write_semantic_tokenizer(tokenizer, folder)
    after = SpeechDecoder.from_directory(options.destination, device="cpu")
    return _compare(before, after, options.destination)


def _speaker(source: Path, decoder: SpeechDecoder) -> Path | SmallSpeakerEncoder | NoSpeaker:
    """The speaker encoder: an ONNX file as it is, another one loaded."""
    found = speaker_file(source)
    if found is None:
        return NoSpeaker(decoder.flow.config.speaker_size)
    return found if found.suffix == ".onnx" else SmallSpeakerEncoder.load(found)


def _write_semantic_tokenizer(source: Path, folder: Path) -> None:
    """Put the semantic tokenizer's ONNX file into a folder, copied where there is one."""
    if (source / ONNX_FILE).is_file():
        shutil.copyfile(source / ONNX_FILE, folder / ONNX_FILE)
        return
    tokenizer = SpeechTokenizer.from_directory(source, "cpu")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = Path(scratch) / "tokenizer"
        write_released(tokenizer.linguistic, tokenizer.semantic, written)
        (written / ONNX_FILE).replace(folder / ONNX_FILE)


def _compare(before: SpeechDecoder, after: SpeechDecoder, directory: Path) -> int:
    """Say what was written, and whether it makes the same; the exit status."""
    random = np.random.default_rng(0)
    codes = SpeechTokens(
        random.integers(0, 1024, _TEST_GROUPS * LINGUISTIC_PER_GROUP).astype(np.int32),
        random.integers(0, 1024, _TEST_GROUPS * SEMANTIC_PER_GROUP).astype(np.int32),
    )
    prompt, again = (decoder.prompt(speech_like(_TEST_SAMPLES)) for decoder in (before, after))
    (wanted,), (found,) = (decoder.decode([codes], [prompt]) for decoder in (before, after))
    different = int((wanted != found).sum())
    off = float((prompt.speaker - again.speaker).norm() / prompt.speaker.norm().clamp(min=torch.finfo().tiny))
    show_files(directory)
    console = Console()
    samples = f"{different} differ" if different else "equal"
    console.print(f"read again: samples {samples} ({len(wanted)} in all); voice off by {off:.1e} of its length")
    if not (directory / ONNX_FILE).is_file():
        console.print(f"{ONNX_FILE} is not there, and StepFun's programs open one: give --speech-tokenizer")
    return 1 if different or off > _VOICE_TOLERANCE else 0
