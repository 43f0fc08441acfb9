"""Recordings with their texts -> conversations: recognition, or synthesis in two rounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.sft import ChatTask
from stepaudio_train.data.importers.base import Imported
from stepaudio_train.data.prompts import Voice, recognition_record, synthesis_record
from stepaudio_train.data.records import AudioPart
from stepaudio_train.data.sources import Refusal


@dataclass(frozen=True)
class Utterance:
    """A recording whose words are known."""

    where: str
    id: str
    text: str
    audio: AudioPart


def spoken_records(found: Iterable[Utterance | Refusal], task: ChatTask | None) -> Iterator[Imported | Refusal]:
    """Conversations that recordings make.

    Args:
        task: `asr`, which is taken for None, or `tts`.

    Raises:
        UserError: another task.
    """
    if task not in (None, "asr", "tts"):
        raise UserError(f"--task {task}: recordings and their texts make asr or tts; type --task asr or --task tts")
    if task == "tts":
        yield from _synthesis(list(found))
        return
    for one in found:
        yield one if isinstance(one, Refusal) else Imported(one.where, recognition_record(one.id, one.audio, one.text))


def _synthesis(found: list[Utterance | Refusal]) -> Iterator[Imported | Refusal]:
    """Each text, to be said in the voice of its speaker's recording before it; the first one has the last."""
    before = {one.audio.speaker: one for one in found if isinstance(one, Utterance)}
    for one in found:
        if isinstance(one, Refusal):
            yield one
        elif one.audio.speaker is None:
            yield Refusal(one.where, "no speaker: synthesis needs another recording of the same voice")
        elif before[one.audio.speaker] is one:
            reason = f"the only recording of {one.audio.speaker}: synthesis needs another one of the same voice"
            yield Refusal(one.where, reason)
        else:
            prompt = before[one.audio.speaker]
            before[one.audio.speaker] = one
            voice = Voice(prompt.text, prompt.audio)
            yield Imported(one.where, synthesis_record(one.id, one.text, voice, answer=one.audio))
