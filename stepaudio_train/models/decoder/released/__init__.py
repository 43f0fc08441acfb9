"""The released speech decoder's directory, `CosyVoice-300M-25Hz`: read and written."""

from stepaudio_train.models.decoder.released.directory import (
    is_released_decoder,
    read_released_flow,
    read_released_vocoder,
    writing_released_decoder,
)

__all__ = ["is_released_decoder", "read_released_flow", "read_released_vocoder", "writing_released_decoder"]
