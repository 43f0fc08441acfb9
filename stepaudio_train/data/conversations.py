"""A JSONL file of conversations -> documents to train on, and what was left out and why."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.schema import VocabularyConfig
from stepaudio_train.config.sft import SftConfig, SftDataConfig
from stepaudio_train.data.batch import TASKS
from stepaudio_train.data.chat import task_of
from stepaudio_train.data.conversation_files import (
    ConversationFile,
    EncodedConversations,
    Worker,
    encode_conversations,
)
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.packing import Document
from stepaudio_train.data.render import Renderer, RenderError
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_NAMED_REFUSALS = 10


class Reported(Protocol):
    """What a file gives to train on; its length is how much that is."""

    @property
    def path(self) -> Path: ...
    @property
    def refused(self) -> list[Refusal]: ...
    def __len__(self) -> int: ...
    def report(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Conversations:
    """What one file gives to train on."""

    path: Path
    documents: list[Document]
    refused: list[Refusal]

    def __len__(self) -> int:
        return len(self.documents)

    def report(self) -> dict[str, Any]:
        """Counts, and every line that was left out with the reason."""
        return {
            "path": str(self.path),
            "conversations": len(self.documents),
            "tasks": dict(Counter(TASKS[document.task] for document in self.documents).most_common()),
            "tokens": sum(len(document) for document in self.documents),
            "tokens_with_loss": sum(int((document.loss_weights[1:] > 0).sum()) for document in self.documents),
            "num_refused": len(self.refused),
            "refused": [asdict(refusal) for refusal in self.refused],
        }


def load_conversations(
    config: SftConfig, vocabulary: Vocabulary, cache: Path, worker: Worker | None = None
) -> dict[str, Conversations]:
    """The conversations of "data", and those of "validation" if there are any.

    Every process of a run calls it; each encodes a share of the recordings, and all get the same documents.

    Args:
        cache: folder for the codes of recordings, seen by all processes.

    Raises:
        ConfigError: the text tokenizer does not fit the vocabulary.
        UserError: a file holds no conversation that can be used.
    """
    worker = worker or Worker()
    renderer = chat_renderer(config.vocabulary, vocabulary)
    data, paths = config.data, [config.data.path, *([] if config.validation is None else [config.validation])]
    tags, tokenizer = TagVocabulary(data.own_tags), data.speech_tokenizer
    files = [ConversationFile.read(Path(path), tags, tokenizer is not None) for path in paths]
    encoded = encode_conversations(files, None if tokenizer is None else Path(tokenizer), cache, worker)
    longest = config.training.sequence_length
    rendered = [render_conversations(found, renderer, data, longest) for found in encoded]
    return dict(zip(("data", "validation"), rendered, strict=False))


def chat_renderer(config: VocabularyConfig, vocabulary: Vocabulary) -> Renderer:
    """The renderer with the configuration's text tokenizer.

    Raises:
        ConfigError: there is none, or it does not fit the vocabulary.
    """
    file = config.text_tokenizer
    if file is None:
        raise ConfigError(["vocabulary.text_tokenizer: needed to encode text; type vocabulary.text_tokenizer=FILE"])
    tokenizer = TextTokenizer.from_file(file)
    # The released file lists audio pieces behind its text pieces; a small one has text pieces alone.
    if tokenizer.size > vocabulary.text_size and tokenizer.encode("<audio_0>") != [vocabulary.text_size]:
        raise ConfigError(
            [
                f"vocabulary.text_size={vocabulary.text_size}: {file} has {tokenizer.size} text ids; type "
                f"vocabulary.text_size={tokenizer.size}"
            ]
        )
    return Renderer(vocabulary, tokenizer)


def write_report(found: Mapping[str, Reported], path: Path) -> None:
    """Write what was used of each file, and every line that was left out and why; log the first of them."""
    reports = {name: file.report() for name, file in found.items()}
    write_atomically(path, json.dumps(reports, indent=1, ensure_ascii=False).encode())
    for file in found.values():
        log.info("%s: %d used, %d left out", file.path, len(file), len(file.refused))
        for refusal in file.refused[:_NAMED_REFUSALS]:
            log.warning("left out: %s: %s", refusal.name, refusal.reason)
        if len(file.refused) > _NAMED_REFUSALS:
            log.warning("left out: %d in all; %s names them", len(file.refused), path)


def render_conversations(
    found: EncodedConversations, renderer: Renderer, data: SftDataConfig, longest: int
) -> Conversations:
    """Documents of at most `longest` tokens.

    Raises:
        UserError: no conversation can be used.
    """
    documents, refused = [], list(found.refused)
    for where, sample in found.samples:
        try:
            document = renderer.render_chat(sample, data.template, data.loss, data.history)
        except RenderError as error:
            refused.append(Refusal(where, str(error).removeprefix(f"{sample.record.id}: ")))
            continue
        if len(document) > longest:
            reason = f"has {len(document)} tokens; type training.sequence_length={len(document)} or more"
            refused.append(Refusal(where, reason))
            continue
        weight = data.task_weights.get(task_of(sample.record), 1.0)
        documents.append(replace(document, loss_weights=document.loss_weights * np.float32(weight)))
    refused.sort(key=lambda refusal: _line(refusal.name))
    if not documents:
        reasons_shown = "; ".join(f"{r.name}: {r.reason}" for r in refused[:3]) or "it is empty"
        raise UserError(f"{found.path}: no conversation can be used ({reasons_shown})")
    return Conversations(found.path, documents, refused)


def _line(where: str) -> int:
    return int(where.rpartition(":")[2])
