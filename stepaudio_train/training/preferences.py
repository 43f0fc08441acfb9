"""What reward models' and DPO's runs have in common, and how a reward model is measured."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepaudio_train.config.preference_runs import PreferenceRunConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.conversation_files import Worker
from stepaudio_train.data.conversations import chat_renderer, write_report
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.packing import Document
from stepaudio_train.data.preferences import DocumentPair, Preferences, load_preferences
from stepaudio_train.data.sft_loader import P, Pack, SftLoader, validation_batches
from stepaudio_train.engines.base import Engine
from stepaudio_train.objectives.base import TokenOutputs
from stepaudio_train.objectives.reward import expected_calibration_error
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.engine_run import engine_run
from stepaudio_train.training.loop import Sums, means
from stepaudio_train.training.pair_outputs import pair_outputs
from stepaudio_train.training.run_directory import RunDirectory

log = logging.getLogger(__name__)

HELD_OUT_FILE = "held_out_pairs.jsonl"
_CALIBRATION = "calibration/"


@contextmanager
def preference_run(config: PreferenceRunConfig) -> Iterator[tuple[RunDirectory, Engine, dict[str, Preferences]]]:
    """The run's directory, claimed; its engine, without weights; and the pairs of "data" and "held_out".

    Every process of a run enters it.

    Raises:
        ConfigError: the directory is not the run's, or the text tokenizer does not fit the vocabulary.
        UserError: a file holds no pair that can be used.
    """
    with engine_run(config) as (run, engine):
        renderer = chat_renderer(config.vocabulary, Vocabulary.from_config(config.vocabulary))
        worker = Worker(engine.rank, engine.world_size, str(engine.device), engine.barrier, config.logging.progress_bar)
        found = load_preferences(config.data, renderer, config.training.sequence_length, run.path / "tokens", worker)
        if engine.is_main:
            write_report(found, run.path / "data_report.json")
        yield run, engine, found


def preference_batches(
    config: PreferenceRunConfig, engine: Engine, pairs: Sequence[P], held_out: Sequence[P], pack: Pack[P]
) -> tuple[SftLoader[P], list[TokenBatch]]:
    """This replica's training batches, and its fixed held-out ones."""
    training, replica = config.training, (engine.data_parallel_rank, engine.data_parallel_size)
    rows = (training.sequence_length, training.global_batch_rows)
    loader = SftLoader(pairs, *rows, training.seed, *replica, pack)
    return loader, validation_batches(held_out, *rows, training.eval_batches, *replica, pack)


def reward_metrics(sums: Sums) -> dict[str, float]:
    """Means of what `RewardLoss` measures, and `calibration_error` in place of its single bins."""
    kept = {name: value for name, value in sums.items() if not name.startswith(_CALIBRATION)}
    return {**means(kept), "calibration_error": expected_calibration_error(sums)}


class HeldOutScores:
    """Writes `held_out_pairs.jsonl` once a reward model has learned: every held-out pair, the most wrong one first,
    with `category`, `margin`, the scores `chosen_score` and `rejected_score`, and what was asked and answered, as text.
    See `training.loop.Sampler`."""

    every_steps = 0

    def __init__(
        self,
        preferences: Preferences,
        config: PreferenceRunConfig,
        run: RunDirectory,
        readable: Callable[[Sequence[int]], str],
    ) -> None:
        """`readable`: ids as text."""
        self._preferences, self._config, self._run, self._readable = preferences, config, run, readable

    def __call__(self, engine: Engine, step: int) -> None:
        """Score with the engine's weights. Every rank calls it; the main one writes."""
        folder = self._run.path / "held_out_scores"
        if engine.is_main:
            # A killed run may have left scores of other weights.
            shutil.rmtree(folder, ignore_errors=True)
        engine.barrier()
        pairs = self._preferences.pairs
        progress = "held-out pairs" if self._config.logging.progress_bar else ""
        values = pair_outputs(engine, pairs, self._config.training, _values, folder, progress)
        engine.barrier()
        if engine.is_main:
            lines = [self._line(pair, of_pair) for pair, of_pair in zip(pairs, values, strict=True)]
            lines.sort(key=lambda line: float(line["chosen_score"]) - float(line["rejected_score"]))
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(self._run.path / HELD_OUT_FILE, text.encode())
            shutil.rmtree(folder)

    def _line(self, pair: DocumentPair, values: NDArray[np.float32]) -> dict[str, str | float]:
        chosen, rejected = pair.chosen, pair.rejected
        asked, better = _cut(chosen)
        texts = {"prompt": asked, "chosen": better, "rejected": _cut(rejected)[1]}
        return {
            "category": self._preferences.categories[pair.category],
            "margin": pair.margin,
            "chosen_score": _score(chosen, values[: len(chosen)]),
            "rejected_score": _score(rejected, values[len(chosen) :]),
            **{name: self._readable(ids) for name, ids in texts.items()},
        }


def _values(outputs: TokenOutputs) -> Tensor:
    assert outputs.values is not None, "a reward model has a value head"
    return outputs.values


def _score(document: Document, values: NDArray[np.float32]) -> float:
    """The value at the token before the last one that teaches, as `objectives.documents.answer_ends` has it."""
    return float(values[np.flatnonzero(document.loss_weights[1:])[-1]])


def _cut(document: Document) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the answer."""
    start = int(np.flatnonzero(document.loss_weights)[0])
    return document.ids[:start].tolist(), document.ids[start:].tolist()
