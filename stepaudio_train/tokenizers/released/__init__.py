"""The released Step-Audio-Tokenizer directory: read and written."""

from stepaudio_train.tokenizers.released.directory import CENTROIDS_FILE, is_released, read_released, write_released

__all__ = ["CENTROIDS_FILE", "is_released", "read_released", "write_released"]
