"""A JSONL file of conversations -> documents to train on, and what was left out and why.

Lines become records, whose recordings are found but not opened; recordings become codes, once (`data/speech_cache.py`);
records and codes become ids (`data/render.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.sft import SftConfig, SftDataConfig
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.packing import Document
from stepaudio_train.data.records import Record, RecordError, parse_record
from stepaudio_train.data.render import Renderer, RenderError, TokenSample
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.speech_cache import SpeechCache
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_NAMED_REFUSALS = 10


@dataclass(frozen=True)
class Worker:
    """This process among those that build the same documents."""

    rank: int = 0
    num_processes: int = 1
    device: str = "auto"
    """Where recordings are encoded."""
    wait_for_all: Callable[[], None] = lambda: None
    """Returns when every process has called it."""
    progress_bar: bool = False
    """On rank 0."""


@dataclass(frozen=True)
class ConversationFile:
    """The lines of a file that are conversations, and those that are not."""

    path: Path
    records: list[tuple[str, Record]]
    """(file:line, conversation)."""
    refused: list[Refusal]

    @classmethod
    def read(cls, path: Path, with_recordings: bool) -> ConversationFile:
        """Read every line; blank ones are skipped.

        Args:
            with_recordings: whether recordings may come without their codes.
        """
        records, refused = [], []
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = parse_record(line, where, default_id=f"{path.name}:{number}")
                    _require_recordings(record, where, path.parent, with_recordings)
                except RecordError as error:
                    refused.append(Refusal(where, str(error).removeprefix(f"{where}: ")))
                    continue
                records.append((where, record))
        return cls(path, records, refused)

    def recordings(self) -> list[Path]:
        """Recordings whose codes are not in the file, in its order."""
        return [path for _, record in self.records for path in _recordings(record, self.path.parent).values()]


@dataclass(frozen=True)
class Conversations:
    """What one file gives to train on."""

    path: Path
    documents: list[Document]
    refused: list[Refusal]

    def report(self) -> dict[str, Any]:
        """Counts, and every line that was left out with the reason."""
        return {
            "path": str(self.path),
            "conversations": len(self.documents),
            "tokens": sum(len(document) for document in self.documents),
            "tokens_with_loss": int(sum(document.loss_weights[1:].sum() for document in self.documents)),
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
    renderer = _renderer(config, vocabulary)
    data, paths = config.data, {"data": config.data.path}
    if config.validation is not None:
        paths["validation"] = config.validation
    with_recordings = data.speech_tokenizer is not None
    files = {name: ConversationFile.read(Path(path), with_recordings) for name, path in paths.items()}
    recordings = [path for file in files.values() for path in file.recordings()]
    codes: dict[Path, SpeechTokens] = {}
    reasons: dict[Path, str] = {}
    if data.speech_tokenizer is not None and recordings:
        speech = SpeechCache(cache, Path(data.speech_tokenizer))
        progress = worker.progress_bar and worker.rank == 0
        speech.encode(recordings, (worker.rank, worker.num_processes), worker.device, progress)
        worker.wait_for_all()
        codes, reasons = speech.look_up(recordings)
    longest = config.training.sequence_length
    return {name: _rendered(file, renderer, data, longest, codes, reasons) for name, file in files.items()}


def write_report(found: Mapping[str, Conversations], path: Path) -> None:
    """Write what was used of each file, and every line that was left out and why; log the first of them."""
    reports = {name: conversations.report() for name, conversations in found.items()}
    write_atomically(path, json.dumps(reports, indent=1, ensure_ascii=False).encode())
    for conversations in found.values():
        used, refused = len(conversations.documents), conversations.refused
        log.info("%s: %d conversations, %d left out", conversations.path, used, len(refused))
        for refusal in refused[:_NAMED_REFUSALS]:
            log.warning("left out: %s: %s", refusal.name, refusal.reason)
        if len(refused) > _NAMED_REFUSALS:
            log.warning("left out: %d in all; %s names them", len(refused), path)


def _rendered(
    file: ConversationFile,
    renderer: Renderer,
    data: SftDataConfig,
    longest: int,
    codes: dict[Path, SpeechTokens],
    reasons: dict[Path, str],
) -> Conversations:
    documents, refused = [], list(file.refused)
    for where, record in file.records:
        own = _recordings(record, file.path.parent)
        unread = [reasons[path] for path in own.values() if path in reasons]
        if unread:
            refused.append(Refusal(where, "; ".join(unread)))
            continue
        sample = TokenSample(record, {name: codes[path] for name, path in own.items()})
        try:
            document = renderer.render_chat(sample, data.template, data.loss)
        except RenderError as error:
            refused.append(Refusal(where, str(error).removeprefix(f"{record.id}: ")))
            continue
        if len(document) > longest:
            reason = f"has {len(document)} tokens; type training.sequence_length={len(document)} or more"
            refused.append(Refusal(where, reason))
            continue
        documents.append(document)
    refused.sort(key=lambda refusal: _line(refusal.name))
    if not documents:
        reasons_shown = "; ".join(f"{r.name}: {r.reason}" for r in refused[:3]) or "it is empty"
        raise UserError(f"{file.path}: no conversation can be used ({reasons_shown})")
    return Conversations(file.path, documents, refused)


def _require_recordings(record: Record, where: str, folder: Path, with_recordings: bool) -> None:
    for path in _recordings(record, folder).values():
        if not with_recordings:
            raise RecordError(f"{where}: {path}: comes without tokens; type data.speech_tokenizer=DIR to encode it")
        if not path.is_file():
            raise RecordError(f"{where}: {path}: no such recording")


def _recordings(record: Record, folder: Path) -> dict[str, Path]:
    """Name in the record -> file, of those audio parts that come without codes."""
    return {part.audio: folder / part.audio for part in record.audio_parts() if part.tokens is None}


def _renderer(config: SftConfig, vocabulary: Vocabulary) -> Renderer:
    file = config.vocabulary.text_tokenizer
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


def _line(where: str) -> int:
    return int(where.rpartition(":")[2])
