"""A JSONL file of conversations -> records whose recordings are codes, and what was left out and why.

Lines become records, whose recordings are found but not opened; recordings become codes, once (`data/speech_cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from stepaudio_train.data.chat import task_of
from stepaudio_train.data.records import Record, RecordError, TextPart, parse_record
from stepaudio_train.data.render import TokenSample
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.speech_cache import SpeechCache
from stepaudio_train.data.tags import TagError, TagVocabulary
from stepaudio_train.tokenizers.dual import GROUP_SAMPLES, LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP
from stepaudio_train.tokenizers.speech import SpeechTokens


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
    def read(cls, path: Path, tags: TagVocabulary, with_recordings: bool = True) -> ConversationFile:
        """Read every line; blank ones are skipped.

        Args:
            tags: the instruction tags that a text to be spoken may begin with.
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
                    require_recordings(record, where, path.parent, with_recordings)
                    require_known_tags(record, tags)
                except (RecordError, TagError) as error:
                    refused.append(Refusal(where, str(error).removeprefix(f"{where}: ")))
                    continue
                records.append((where, record))
        return cls(path, records, refused)

    def recordings(self) -> list[Path]:
        """Recordings whose codes are not in the file, in its order."""
        return [path for _, record in self.records for path in recordings_of(record, self.path.parent).values()]


@dataclass(frozen=True)
class EncodedConversations:
    """The conversations of a file with the codes of their recordings, and the lines that were left out."""

    path: Path
    samples: list[tuple[str, TokenSample]]
    """(file:line, conversation)."""
    refused: list[Refusal]


def encode_conversations(
    files: Sequence[ConversationFile], speech_tokenizer: Path | None, cache: Path, worker: Worker
) -> list[EncodedConversations]:
    """Every process of a run calls it; each encodes a share of the recordings, and all get the same codes.

    Args:
        speech_tokenizer: None where every recording comes with its codes.
        cache: folder for the codes of recordings, seen by all processes.
    """
    recordings = [path for file in files for path in file.recordings()]
    codes: dict[Path, SpeechTokens] = {}
    reasons: dict[Path, str] = {}
    if speech_tokenizer is not None and recordings:
        speech = SpeechCache(cache, speech_tokenizer)
        progress = worker.progress_bar and worker.rank == 0
        speech.encode(recordings, (worker.rank, worker.num_processes), worker.device, progress)
        worker.wait_for_all()
        codes, reasons = speech.look_up(recordings)
    return [_with_codes(file, codes, reasons) for file in files]


def with_silent_codes(file: ConversationFile) -> EncodedConversations:
    """The file's conversations with as many codes as their recordings are long, to count without a tokenizer."""
    codes: dict[Path, SpeechTokens] = {}
    reasons: dict[Path, str] = {}
    for path in dict.fromkeys(file.recordings()):
        try:
            found = soundfile.info(path)
        except (OSError, soundfile.SoundFileError) as error:
            reasons[path] = f"{path}: cannot be read as audio: {error}"
            continue
        groups = round(found.duration * 16000) // GROUP_SAMPLES
        codes[path] = SpeechTokens(
            np.zeros(groups * LINGUISTIC_PER_GROUP, np.int32), np.zeros(groups * SEMANTIC_PER_GROUP, np.int32)
        )
    return _with_codes(file, codes, reasons)


def require_known_tags(record: Record, tags: TagVocabulary) -> None:
    """See that a text to be spoken begins with tags that there are.

    Raises:
        TagError: it does not.
    """
    questions = [message for message in record.messages if message.role == "human"]
    if questions and task_of(record) == "tts":
        tags.parse("".join(part.text for part in questions[-1].content if isinstance(part, TextPart)))


def require_recordings(record: Record, where: str, folder: Path, with_recordings: bool) -> None:
    """See that recordings without codes are files, and that there may be any.

    Raises:
        RecordError: naming `where` and the recording.
    """
    for path in recordings_of(record, folder).values():
        if not with_recordings:
            raise RecordError(f"{where}: {path}: comes without tokens; type data.speech_tokenizer=DIR to encode it")
        if not path.is_file():
            raise RecordError(f"{where}: {path}: no such recording")


def recordings_of(record: Record, folder: Path) -> dict[str, Path]:
    """Name in the record -> file, of those audio parts that come without codes."""
    return {part.audio: folder / part.audio for part in record.audio_parts() if part.tokens is None}


def _with_codes(
    file: ConversationFile, codes: Mapping[Path, SpeechTokens], reasons: Mapping[Path, str]
) -> EncodedConversations:
    samples, refused = [], list(file.refused)
    for where, record in file.records:
        own = recordings_of(record, file.path.parent)
        unread = [reasons[path] for path in own.values() if path in reasons]
        if unread:
            refused.append(Refusal(where, "; ".join(unread)))
        else:
            samples.append((where, TokenSample(record, {name: codes[path] for name, path in own.items()})))
    return EncodedConversations(file.path, samples, refused)
