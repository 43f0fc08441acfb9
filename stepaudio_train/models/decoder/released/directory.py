"""The directory of the speech decoder that StepFun's and CosyVoice's programs load (formats.md 5.1).

    cosyvoice.yaml              what is built, in hyperpyyaml
    flow.pt, hift.pt            weights
    campplus.onnx               speaker encoder
    speech_tokenizer_v1.onnx    semantic tokenizer; the programs open it, and nothing here reads it

Sizes are read from the file, so a decoder of any size can be laid out like this.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepaudio_train.config.decoder import FlowSolverConfig
from stepaudio_train.config.errors import UserError
from stepaudio_train.models.decoder.flow import FlowMatching
from stepaudio_train.models.decoder.flow_files import NoSpeaker
from stepaudio_train.models.decoder.released.settings import (
    YAML_FILE,
    ReleasedSettings,
    read_settings,
    write_settings,
)
from stepaudio_train.models.decoder.released.speaker_onnx import write_speaker_onnx
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import RELEASED_FILE, load_vocoder_weights
from stepaudio_train.models.decoder.weights import DecoderWeightError, read_weights, write_torch_weights

_FLOW_FILE = "flow.pt"
_SPEAKER_FILE = "campplus.onnx"
_VERSION_FILE = "VERSION_Vq0206Vocoder_1202"
"""Empty, as released: says by its name which tokens the decoder takes."""


def is_released_decoder(directory: Path) -> bool:
    """Whether the directory is laid out as the released one."""
    return (directory / YAML_FILE).is_file()


def read_released_flow(directory: Path) -> tuple[FlowMatching, FlowSolverConfig]:
    """The flow, on the CPU, and how a mel is drawn from it.

    Raises:
        DecoderWeightError: a file is missing or broken, or says another decoder.
        FlowError: weights of other sizes.
    """
    if not (directory / _SPEAKER_FILE).is_file():
        raise DecoderWeightError(f"{directory / _SPEAKER_FILE}: is missing; copy the whole directory")
    settings = read_settings(directory / YAML_FILE)
    flow = FlowMatching.from_state_dict(settings.flow, read_weights(directory / _FLOW_FILE))
    return flow.eval(), settings.solver


def read_released_vocoder(directory: Path) -> HiFTGenerator:
    """The vocoder, on the CPU.

    Raises:
        DecoderWeightError: a file is missing or broken, says another decoder, or has other sizes.
    """
    vocoder = HiFTGenerator(read_settings(directory / YAML_FILE).vocoder)
    load_vocoder_weights(vocoder, directory / RELEASED_FILE)
    return vocoder.eval()


@contextmanager
def writing_released_decoder(
    flow: FlowMatching,
    solver: FlowSolverConfig,
    vocoder: HiFTGenerator,
    speaker: Path | SmallSpeakerEncoder | NoSpeaker,
    directory: Path,
) -> Iterator[Path]:
    """Write the directory, whole or not at all; within the block files can be added to the folder that is yielded.

    Args:
        speaker: an ONNX file is copied, an encoder of this project's own becomes one.
        directory: must not be there yet.

    Raises:
        UserError: the directory exists.
        ConfigError: sizes that the released programs cannot have.
    """
    if directory.exists():
        raise UserError(f"{directory}: exists already; type another folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write_settings(ReleasedSettings(flow.config, solver, vocoder.config), temporary / YAML_FILE)
        write_torch_weights(flow, temporary / _FLOW_FILE)
        write_torch_weights(vocoder, temporary / RELEASED_FILE)
        if isinstance(speaker, Path):
            shutil.copyfile(speaker, temporary / _SPEAKER_FILE)
        else:
            write_speaker_onnx(speaker, temporary / _SPEAKER_FILE)
        (temporary / _VERSION_FILE).touch()
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
