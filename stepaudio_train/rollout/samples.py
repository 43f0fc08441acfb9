"""What a model answers while it learns: the same conversations every so many steps, beside what it should have said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from stepaudio_train.data.batch import TASKS
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.packing import Document
from stepaudio_train.engines.base import Engine
from stepaudio_train.engines.precision import choose_dtype
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.rollout.generate import Generation, generate
from stepaudio_train.rollout.sampling import ANSWER_ENDS, SamplingConfig
from stepaudio_train.tokenizers.dual import audio_ids_to_text
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Special, Vocabulary

_SPEECH_TEMPERATURE = 0.7
"""As the released programs speak."""
_MORE_TOKENS = 32


@dataclass(frozen=True)
class Exchange:
    """A conversation up to an answer, and that answer."""

    id: int
    """Place among the documents that could be used; the seed of what is drawn."""
    task: str
    prompt: list[int]
    reference: list[int]
    """Without the id that ends it."""


class SampleWriter:
    """Writes `step_XXXXXXXX.jsonl` files: `id`, `task`, `prompt`, `reference`, `answer`, and whether the answer
    `ended`. See `training.loop.Sampler`."""

    def __init__(
        self,
        exchanges: Sequence[Exchange],
        every_steps: int,
        folder: Path,
        text_tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
    ) -> None:
        self.every_steps = every_steps
        self._exchanges, self._folder = exchanges, folder
        self._text_tokenizer, self._vocabulary = text_tokenizer, vocabulary

    def __call__(self, engine: Engine, step: int) -> None:
        """Answer with the engine's weights. Every rank calls it; the main one generates, from a copy of the weights in
        the dtype that the run computes in, and must have the memory for that."""
        dtype = choose_dtype(engine.config.engine.precision, engine.device)
        weights = {name: tensor.to(dtype) for name, tensor in engine.export_weights()}
        if engine.is_main:
            model = Step1ForCausalLM.of_weights(engine.config.model, weights).to(engine.device)
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self._answered(model)]
            write_atomically(self._folder / f"step_{step:08d}.jsonl", "".join(lines).encode())
        engine.barrier()

    def _answered(self, model: Step1ForCausalLM) -> list[dict[str, object]]:
        answers: dict[int, Generation] = {}
        for spoken in (False, True):
            chosen = [exchange for exchange in self._exchanges if self._is_spoken(exchange) == spoken]
            longest = max((len(exchange.reference) for exchange in chosen), default=0)
            sampling = SamplingConfig(
                # One that does not end shall not hold up the training for long.
                max_new_tokens=2 * longest + _MORE_TOKENS,
                temperature=_SPEECH_TEMPERATURE if spoken else 0.0,
                stop_ids=ANSWER_ENDS,
            )
            ids = [exchange.id for exchange in chosen]
            found = generate(model, [exchange.prompt for exchange in chosen], sampling, seeds=ids)
            answers |= dict(zip(ids, found, strict=True))
        return [self._line(exchange, answers[exchange.id]) for exchange in self._exchanges]

    def _line(self, exchange: Exchange, answer: Generation) -> dict[str, object]:
        texts = {"prompt": exchange.prompt, "reference": exchange.reference, "answer": answer.ids}
        shown = {name: readable(ids, self._text_tokenizer, self._vocabulary) for name, ids in texts.items()}
        return {"id": exchange.id, "task": exchange.task, **shown, "ended": answer.stop_id == Special.EOT}

    def _is_spoken(self, exchange: Exchange) -> bool:
        vocabulary = self._vocabulary
        return any(vocabulary.linguistic_offset <= index < vocabulary.audio_end for index in exchange.reference)


def first_exchanges(documents: Sequence[Document], count: int) -> list[Exchange]:
    """The first documents that have an answer which teaches; of several answers, the last."""
    taught = ((index, document) for index, document in enumerate(documents) if document.loss_weights.any())
    return [_exchange(index, document) for index, document in islice(taught, count)]


def readable(ids: Sequence[int], text_tokenizer: TextTokenizer, vocabulary: Vocabulary) -> str:
    """Ids as text: control pieces written out, audio as `<audio_k>`, and `<id_k>` for what stands for nothing."""
    text_size = min(vocabulary.text_size, text_tokenizer.size)

    def kind(index: int) -> str:
        if index < text_size:
            return "text"
        return "audio" if vocabulary.linguistic_offset <= index < vocabulary.audio_end else "unused"

    shown = ""
    for name, run in groupby(ids, kind):
        if name == "text":
            shown += text_tokenizer.decode(list(run))
        elif name == "audio":
            shown += audio_ids_to_text(list(run), vocabulary)
        else:
            shown += "".join(f"<id_{index}>" for index in run)
    return shown


def _exchange(index: int, document: Document) -> Exchange:
    taught = np.flatnonzero(document.loss_weights)
    breaks = np.flatnonzero(np.diff(taught) > 1)
    start, end = int(taught[breaks[-1] + 1] if len(breaks) else taught[0]), int(taught[-1]) + 1
    ids = document.ids.tolist()
    ended = ids[end - 1] in ANSWER_ENDS
    return Exchange(index, TASKS[document.task], ids[:start], ids[start : end - 1 if ended else end])
