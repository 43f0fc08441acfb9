"""The directory that StepFun's tokenizer.py takes.

    linguistic_tokenizer.npy       centroids [codes, hidden] float32
    speech_tokenizer_v1.onnx       semantic tokenizer
    dengcunqin/speech_.../         FunASR model directory of the linguistic encoder

Sizes are read from the files, so a tokenizer of any size can be laid out like this.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from stepaudio_train.config.tokenizer import SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.released.funasr_files import FUNASR_DIRECTORY, read_funasr, write_funasr
from stepaudio_train.tokenizers.released.onnx_reading import read_semantic_onnx
from stepaudio_train.tokenizers.released.onnx_writing import write_semantic_onnx
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.weight_files import (
    LINGUISTIC_FILE,
    SEMANTIC_FILE,
    TokenizerError,
    save_settings,
    save_weights,
)

CENTROIDS_FILE = "linguistic_tokenizer.npy"
ONNX_FILE = "speech_tokenizer_v1.onnx"
_RELEASED_PIECES = (SemanticConfig().piece_tokens, SemanticConfig().context_tokens)


def is_released(directory: Path) -> bool:
    """Whether the directory is laid out as the released one."""
    return (directory / CENTROIDS_FILE).is_file()


def read_released(directory: Path) -> tuple[LinguisticTokenizer, SemanticTokenizer]:
    """Both tokenizers, on the CPU.

    Raises:
        TokenizerError: a file is missing, broken or of another kind; the message names it.
    """
    for name in (ONNX_FILE, FUNASR_DIRECTORY):
        if not (directory / name).exists():
            raise TokenizerError(f"{directory / name}: is missing; copy the whole Step-Audio-Tokenizer directory")
    path = directory / CENTROIDS_FILE
    try:
        centroids = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error
    linguistic = read_funasr(directory / FUNASR_DIRECTORY, codebook_size=len(centroids))
    if centroids.shape != linguistic.centroids.shape:
        raise TokenizerError(
            f"{path}: has shape {tuple(centroids.shape)}, and the encoder's frames have "
            f"{linguistic.config.hidden_size} numbers"
        )
    linguistic.centroids.copy_(centroids)
    return linguistic, read_semantic_onnx(directory / ONNX_FILE)


def write_released(
    linguistic: LinguisticTokenizer, semantic: SemanticTokenizer, directory: Path, source: Path | None = None
) -> None:
    """Write the whole directory, and this project's own files beside, or nothing.

    Args:
        directory: must not be there yet.
        source: a released directory that the tokenizers come from; what they do not hold (Paraformer's decoder and
            predictor, its list of tokens) is taken over from it.

    Raises:
        TokenizerError: the directory exists, or the released code cannot run this tokenizer.
    """
    if directory.exists():
        raise TokenizerError(f"{directory}: exists already; type another folder")
    if (semantic.config.piece_tokens, semantic.config.context_tokens) != _RELEASED_PIECES:
        raise TokenizerError(
            f"semantic.piece_tokens={semantic.config.piece_tokens}, context_tokens={semantic.config.context_tokens}: "
            "StepFun's code cuts pieces of 30 s without context, so this tokenizer would give other ids there"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write_funasr(linguistic, temporary / FUNASR_DIRECTORY, None if source is None else source / FUNASR_DIRECTORY)
        np.save(temporary / CENTROIDS_FILE, linguistic.centroids.cpu().numpy().astype(np.float32))
        write_semantic_onnx(semantic, temporary / ONNX_FILE)
        save_weights(linguistic, temporary / LINGUISTIC_FILE)
        save_weights(semantic, temporary / SEMANTIC_FILE)
        save_settings(temporary, linguistic.config, semantic.config)
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
