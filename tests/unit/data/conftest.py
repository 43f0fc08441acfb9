"""Made-up token datasets on disk, once for all tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stepaudio_train.data.render import Renderer
from stepaudio_train.testing.token_data import make_speech, make_text, write_text_tokenizer, write_token_dataset
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def text_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_tokenizer(tmp_path_factory.mktemp("text") / "text.model")


@pytest.fixture(scope="session")
def renderer(text_tokenizer_file: Path) -> Renderer:
    tokenizer = TextTokenizer.from_file(text_tokenizer_file)
    return Renderer(Vocabulary(tokenizer.size, reserved_size=128), tokenizer)


@pytest.fixture(scope="session")
def speech_folder(tmp_path_factory, renderer, text_tokenizer_file) -> Path:
    random = np.random.default_rng(0)
    samples = [make_speech(random, f"s{i}") for i in range(400)]
    return write_token_dataset(tmp_path_factory.mktemp("speech"), samples, renderer, text_tokenizer_file)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory, renderer, text_tokenizer_file) -> Path:
    random = np.random.default_rng(1)
    samples = [make_text(random, f"t{i}") for i in range(300)]
    return write_token_dataset(tmp_path_factory.mktemp("texts"), samples, renderer, text_tokenizer_file)
