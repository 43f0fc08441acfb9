"""Made-up documents with structure to learn: what engines, benchmarks and debug runs train on without any corpus.

A document is a random walk over a few made-up words. A word is always spoken by the same group of two linguistic and
three semantic tokens, and always written by the same text token; so audio can be predicted from audio, and text from
audio, as in real speech.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import DataConfig
from stepaudio_train.data.batch import TASKS, TokenBatch
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.packing import Document, pack_rows
from stepaudio_train.tokenizers.vocabulary import FIRST_BYTE_ID, Special, Vocabulary

NUM_WORDS = 16
DOCUMENTS_PER_ROW = 4
_TASKS = ("asr", "continuation", "tts", "text")
_MIN_DOCUMENT_TOKENS = 16
_TRAINING, _VALIDATION = 0, 1


class SyntheticLoader:
    """Same interface as the loader of token shards.

    Every row comes from (seed, step, row) alone, so the global batch is the same at any data-parallel size. In mode
    "packed" a row holds `documents_per_row(sequence_length)` documents; in mode "single" it holds one, and row i is
    document i of the packed batch of that step: `rows_per_step` multiplied by the documents per row gives exactly the
    packed batch's documents in the same order.
    """

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        sequence_length: int,
        rows_per_step: int,
        seed: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        _check(vocabulary, sequence_length, rows_per_step, data_parallel_size)
        rows_per_rank = rows_per_step // data_parallel_size
        self._rows = range(data_parallel_rank * rows_per_rank, (data_parallel_rank + 1) * rows_per_rank)
        self._single = config.synthetic_documents == "single"
        self._vocabulary = vocabulary
        self._sequence_length = sequence_length
        self._seed = seed
        self._step = 0

    def next_batch(self) -> TokenBatch:
        """This data-parallel rank's rows of the next global batch."""
        batch = self._batch(_TRAINING, self._step)
        self._step += 1
        return batch

    def validation_batches(self, num_batches: int) -> list[TokenBatch]:
        """Fixed batches that share no row with the training ones."""
        return [self._batch(_VALIDATION, step) for step in range(num_batches)]

    def save(self, directory: Path) -> None:
        """Write the position into `directory`."""
        write_atomically(directory / "synthetic.json", json.dumps({"step": self._step, "seed": self._seed}).encode())

    def load(self, directory: Path) -> None:
        """Continue where the loader stood that wrote `directory`, at any data-parallel size."""
        state = json.loads((directory / "synthetic.json").read_text(encoding="utf-8"))
        if state["seed"] != self._seed:
            raise ConfigError([f"training.seed={self._seed}: the checkpoint's data order has seed {state['seed']}"])
        self._step = state["step"]

    def close(self) -> None:
        """Nothing is held open."""

    def _batch(self, kind: int, step: int) -> TokenBatch:
        count = documents_per_row(self._sequence_length)
        if not self._single:
            rows = [self._documents(kind, step, row) for row in self._rows]
        else:
            rows = [[self._documents(kind, step, row // count)[row % count]] for row in self._rows]
        return pack_rows(rows, self._sequence_length)

    def _documents(self, kind: int, step: int, row: int) -> list[Document]:
        """The documents of a packed row: together nearly as long as the row."""
        random = np.random.default_rng([kind, self._seed, step, row])
        count = documents_per_row(self._sequence_length)
        spare = self._sequence_length - count * _MIN_DOCUMENT_TOKENS
        cuts = np.sort(random.integers(0, spare + 1, count - 1))
        lengths = np.diff(np.concatenate(([0], cuts, [spare]))) + _MIN_DOCUMENT_TOKENS
        return [self._document(random, int(length)) for length in lengths]

    def _document(self, random: np.random.Generator, max_length: int) -> Document:
        task = _TASKS[random.integers(len(_TASKS))]
        num_words = {"text": max_length - 2, "continuation": (max_length - 4) // 5}.get(task, (max_length - 7) // 6)
        steps = random.integers(1, 4, num_words)
        words = (random.integers(NUM_WORDS) + np.cumsum(steps)) % NUM_WORDS
        written = FIRST_BYTE_ID + words
        spoken = self._speak(words)
        audio = [[Special.AUDIO_START], spoken, [Special.AUDIO_END]]
        text = [[Special.TEXT_START], written, [Special.TEXT_END]]
        parts = {
            "text": [written],
            "continuation": audio,
            "asr": [[Special.ASR], *audio, *text],
            "tts": [[Special.TTS], *text, *audio],
        }[task]
        ids = np.concatenate([[Special.BOS], *parts, [Special.EOS]]).astype(np.int32)
        return Document(ids, np.ones(len(ids), np.float32), TASKS.index(task))

    def _speak(self, words: np.ndarray) -> np.ndarray:
        """[n] words -> [5n] ids, two linguistic and three semantic a word, spread over both codebooks."""
        v = self._vocabulary
        linguistic = (words[:, None] * 2 + np.arange(2)) * (v.linguistic_size // (2 * NUM_WORDS))
        semantic = (words[:, None] * 3 + np.arange(3)) * (v.semantic_size // (3 * NUM_WORDS))
        return np.concatenate([v.linguistic_offset + linguistic, v.semantic_offset + semantic], axis=1).reshape(-1)


def documents_per_row(sequence_length: int) -> int:
    """Documents in a packed row of made-up data."""
    return max(1, min(DOCUMENTS_PER_ROW, sequence_length // (2 * _MIN_DOCUMENT_TOKENS)))


def _check(vocabulary: Vocabulary, sequence_length: int, rows_per_step: int, data_parallel_size: int) -> None:
    problems = []
    if sequence_length < _MIN_DOCUMENT_TOKENS:
        problems.append(
            f"training.sequence_length={sequence_length}: made-up data needs at least {_MIN_DOCUMENT_TOKENS}; type "
            f"training.sequence_length={2 * _MIN_DOCUMENT_TOKENS * DOCUMENTS_PER_ROW}"
        )
    for name, size, least in (
        ("text_size", vocabulary.text_size, FIRST_BYTE_ID + NUM_WORDS),
        ("linguistic_size", vocabulary.linguistic_size, 2 * NUM_WORDS),
        ("semantic_size", vocabulary.semantic_size, 3 * NUM_WORDS),
    ):
        if size < least:
            problems.append(f"vocabulary.{name}={size}: made-up data needs at least {least}")
    if rows_per_step % data_parallel_size:
        problems.append(
            f"training.global_batch_rows={rows_per_step}: must be a multiple of the data-parallel size, "
            f"{data_parallel_size}"
        )
    if problems:
        raise ConfigError(problems)
