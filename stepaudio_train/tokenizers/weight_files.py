"""The files of a speech tokenizer that this project writes: settings, and a state dict for each of its two parts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer

SETTINGS_FILE = "speech_tokenizer.json"
LINGUISTIC_FILE = "linguistic.safetensors"
SEMANTIC_FILE = "semantic.safetensors"


class TokenizerError(UserError, ValueError):
    """A speech tokenizer's files cannot be used. The message names the file."""


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
