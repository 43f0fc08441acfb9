"""A trained vocoder as files: `hift.safetensors` and its sizes, `hift.json`."""

from __future__ import annotations

from pathlib import Path

from stepaudio_train.config.vocoder import VocoderConfig, vocoder_problems
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.weights import (
    DecoderWeightError,
    read_settings,
    read_weights,
    write_part,
    write_torch_weights,
)

_NAME = "hift"
RELEASED_FILE = "hift.pt"
_GAN_PREFIX = "generator."


def save_vocoder(vocoder: HiFTGenerator, folder: Path, release: bool = False) -> None:
    """Write a vocoder, its tensors named as released.

    Args:
        release: write the same as `hift.pt` too, the file that the released programs load.
    """
    write_part(vocoder, vocoder.config, folder, _NAME)
    if release:
        write_torch_weights(vocoder, folder / RELEASED_FILE)


def load_vocoder(folder: Path) -> HiFTGenerator:
    """Read what `save_vocoder` wrote, on the CPU.

    Raises:
        DecoderWeightError: a file is missing or broken, or the two do not belong together.
    """
    vocoder = HiFTGenerator(read_settings(VocoderConfig, folder / f"{_NAME}.json", vocoder_problems))
    load_vocoder_weights(vocoder, folder / f"{_NAME}.safetensors")
    return vocoder.eval()


def load_vocoder_weights(vocoder: HiFTGenerator, path: Path) -> None:
    """Read weights of a vocoder's own sizes into it: a released `hift.pt`, or a `hift.safetensors`.

    Of a checkpoint of CosyVoice's training, with discriminators, the generator is taken.

    Raises:
        DecoderWeightError: missing or broken file, or other sizes.
    """
    weights = read_weights(path)
    generator = {n.removeprefix(_GAN_PREFIX): value for n, value in weights.items() if n.startswith(_GAN_PREFIX)}
    try:
        vocoder.load_state_dict(generator or weights)
    except RuntimeError as error:
        raise DecoderWeightError(f"{path}: is not of the configured sizes: {error}") from error
