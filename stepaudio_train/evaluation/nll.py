"""Held-out negative log-likelihood per modality, beside that of a unigram model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stepaudio_train.config.schema import Task
from stepaudio_train.data.packing import Document, choose_rows, pack_rows
from stepaudio_train.data.render import Renderer, RenderError, TokenSample
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.tokenizers.vocabulary import FIRST_BYTE_ID, Modality, Vocabulary

_ROW_TOKENS = 1024
_SMOOTHING = 0.1
"""Added to every count of the unigram model, so that what training never showed is possible."""


@dataclass(frozen=True)
class Likelihood:
    """Nats per token, by modality in lower case; a modality without held-out tokens is absent."""

    model: dict[str, float]
    unigram: dict[str, float]
    num_tokens: dict[str, int]


def held_out_likelihood(
    model: Step1ForCausalLM,
    renderer: Renderer,
    held_out: Sequence[TokenSample],
    training: Iterable[TokenSample],
    tasks: Sequence[Task],
    batch_rows: int = 8,
) -> Likelihood:
    """Compare the model with the frequencies of the training tokens, on the same held-out tokens.

    Every sample is rendered as each of `tasks` that it can be. What follows the task's input counts: the transcript in
    asr, the audio in tts, everything in continuation. Control pieces, such as <audio_end>, do not count: where they
    stand is nearly always plain, and they would flatter both models.
    """
    documents = list(_rendered(renderer, held_out, tasks))
    counts = _Counts(renderer.vocabulary)
    for document in _rendered(renderer, training, tasks):
        counts.add(_counted(document))
    unigram, num_tokens = counts.nats_per_token(documents)
    return Likelihood(_model_nats(model, renderer.vocabulary, documents, batch_rows), unigram, num_tokens)


class _Counts:
    """Smoothed frequencies of ids within their modality."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._counts = np.zeros(vocabulary.total_size, np.int64)
        self._modality = vocabulary.modality(torch.arange(vocabulary.total_size)).numpy()
        # An id's place among those that can be a target: reserved and control ids never are.
        usable = np.arange(vocabulary.total_size)
        self._usable = (usable >= FIRST_BYTE_ID) & (usable < vocabulary.audio_end)

    def add(self, ids: np.ndarray) -> None:
        np.add.at(self._counts, ids, 1)

    def nats_per_token(self, documents: Sequence[Document]) -> tuple[dict[str, float], dict[str, int]]:
        """Mean over the documents' counted tokens, and how many there are."""
        smoothed = (self._counts + _SMOOTHING) * self._usable
        total = np.array([smoothed[self._modality == modality].sum() for modality in Modality])
        ids = np.concatenate([_counted(document) for document in documents] or [np.zeros(0, np.int32)])
        modality = self._modality[ids]
        nats = np.log(total[modality]) - np.log(smoothed[ids])
        names = {m: m.name.lower() for m in Modality if (modality == m).any()}
        means = {name: float(nats[modality == m].mean()) for m, name in names.items()}
        return means, {name: int((modality == m).sum()) for m, name in names.items()}


def _rendered(renderer: Renderer, samples: Iterable[TokenSample], tasks: Sequence[Task]) -> Iterator[Document]:
    for sample in samples:
        for task in tasks:
            try:
                yield renderer.render(sample, task, loss="target")
            except RenderError:
                continue  # too short for a group, or without the spans that interleaving needs


def _is_counted(document: Document) -> np.ndarray:
    counted = (document.loss_weights > 0) & (document.ids >= FIRST_BYTE_ID)
    counted[0] = False  # nothing stands before the first id
    return counted


def _counted(document: Document) -> np.ndarray:
    return document.ids[_is_counted(document)]


@torch.inference_mode()
def _model_nats(
    model: Step1ForCausalLM, vocabulary: Vocabulary, documents: Sequence[Document], batch_rows: int
) -> dict[str, float]:
    device = model.lm_head.weight.device
    length = max([_ROW_TOKENS, *(len(document) for document in documents)])
    rows = [[documents[i] for i in row] for row in choose_rows([len(document) for document in documents], length)]
    sums, counts = torch.zeros(len(Modality), dtype=torch.float64), torch.zeros(len(Modality), dtype=torch.float64)
    for start in range(0, len(rows), batch_rows):
        batch = pack_rows(rows[start : start + batch_rows], length)
        wanted = (batch.loss_weights > 0) & (batch.targets >= FIRST_BYTE_ID)
        moved = batch.to(device)
        log_probs = model.log_probs(moved.input_ids, moved.targets, moved.documents, wanted.to(device)).cpu().double()
        modality = vocabulary.modality(batch.targets)[wanted].long()
        sums.index_add_(0, modality, -log_probs[wanted])
        counts.index_add_(0, modality, torch.ones_like(log_probs[wanted]))
    means = {m.name.lower(): float(sums[m] / counts[m]) for m in Modality if counts[m]}
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"the model gives no finite likelihood to held-out {', '.join(broken)} tokens")
    return means
