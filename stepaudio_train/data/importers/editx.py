"""Training data of Step-Audio-EditX (scripts/ReadMe.md and src/dataset/ of its release, 2026-01).

Prompts are those of its inference (tts.py), which its training code does not always follow: there a cloned voice and
added sounds are asked for with the source's text instead of the target's.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from stepaudio_train.data.importers.base import Recordings, Row, RowError, id_of, meta_of
from stepaudio_train.data.prompts import Voice, clone_record, edit_instruction, edit_record
from stepaudio_train.data.records import AudioPart, Record
from stepaudio_train.tokenizers.dual import audio_ids_to_text, audio_text_to_ids, split_streams
from stepaudio_train.tokenizers.dual_tokenizer import RELEASED_VOCABULARY

_FIELDS = (
    *("source_audio", "source_text", "source_vq02vq06", "target_audio", "target_text", "target_vq02vq06"),
    *("rejected_vq02vq06", "task_type"),
)
_REMOVED = {"denoise": ("noise", "noise"), "vad": ("silent portions", "silence")}
_KINDS = ("emotion", "style", "speed", *_REMOVED, "paralinguistic", "mask")


def is_editx(row: Row) -> bool:
    """`source_text`, and its audio or codes."""
    return "source_text" in row and ("source_vq02vq06" in row or "source_audio" in row)


def editx_record(row: Row, recordings: Recordings, id: str) -> Record:
    """A record of the task edit or, for a cloned voice, tts; without an answer where there is no target.

    What DPO rejects goes to `meta.rejected_tokens`.

    Raises:
        RowError: an unknown kind of edit, codes that are none, a text that is missing.
    """
    source = _speech(row, "source", recordings)
    if source is None:
        raise RowError("source_vq02vq06: missing, and so is source_audio")
    target = _speech(row, "target", recordings)
    id, meta = id_of(row, id), meta_of(row, _FIELDS)
    if row.get("rejected_vq02vq06"):
        meta["rejected_tokens"] = _tokens(row["rejected_vq02vq06"], "rejected_vq02vq06")
    if (row.get("task_type") or "edit") == "edit":
        return replace(edit_record(id, _instruction(row), source, target), meta=meta)
    # Released training names a voice by a digest of its text and waveform.
    said = _text(row, "source_text")
    digest = hashlib.sha256(f"{said}{source.tokens or source.audio}".encode()).hexdigest()[:16]
    voice = Voice(said, source, f"clone_{digest}")
    return replace(clone_record(id, _text(row, "target_text"), voice, target), meta=meta)


def _instruction(row: Row) -> str:
    """The released wording (tts.py: `_build_audio_edit_instruction`)."""
    kind, said = row.get("edit_type"), _text(row, "source_text").strip()
    if kind in ("emotion", "style", "speed"):
        return edit_instruction(kind, _text(row, "edit_info"), said)
    if kind in _REMOVED:
        what, all_of = _REMOVED[kind]
        return (
            f"Remove any {what} from the given audio while preserving the voice content clearly. Ensure that the "
            f"speech quality remains intact with minimal distortion, and eliminate all {all_of} from the audio.\n"
        )
    if kind == "paralinguistic":
        return (
            "Add some non-verbal sounds to make the audio more natural, the new text is : "
            f"{_text(row, 'target_text')}\n  The text corresponding to the audio is: {said}\n"
        )
    if kind == "mask":
        return f"Edit the audio based on text: {said}\n"
    raise RowError(f"edit_type: must be one of {', '.join(_KINDS)}, got {kind!r}")


def _speech(row: Row, name: str, recordings: Recordings) -> AudioPart | None:
    """The source's or the target's audio; codes are enough, and then the recording need not be there."""
    codes, path = row.get(f"{name}_vq02vq06"), row.get(f"{name}_audio")
    text = row.get(f"{name}_text") or None
    if codes:
        tokens = _tokens(codes, f"{name}_vq02vq06")
        try:
            return AudioPart(recordings.take(path), tokens, text)
        except RowError:
            return AudioPart(tokens=tokens, text=text)
    return AudioPart(recordings.take(path), text=text) if path else None


def _tokens(codes: Any, field: str) -> str:
    """Ids of the released vocabulary, or `<audio_12>...`, as the latter."""
    try:
        ids = audio_text_to_ids(codes, RELEASED_VOCABULARY) if isinstance(codes, str) else codes
        split_streams(ids, RELEASED_VOCABULARY)
        return audio_ids_to_text(ids, RELEASED_VOCABULARY)
    except ValueError as error:
        raise RowError(f"{field}: {error}") from None


def _text(row: Row, field: str) -> str:
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{field}: must be text, got {text!r}")
    return text
