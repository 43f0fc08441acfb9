"""A Kaldi data directory: wav.scp, text, utt2spk, segments (kaldi-asr.org/doc/data_prep.html)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.importers.base import Recordings, RowError
from stepaudio_train.data.importers.spoken import Utterance
from stepaudio_train.data.records import AudioPart
from stepaudio_train.data.sources import Refusal

_MAX_OVERSHOOT_S = 0.5
"""A segment may end this much behind its recording, as for Kaldi's extract-segments."""


@dataclass(frozen=True)
class _Line:
    where: str
    value: str


def kaldi_utterances(folder: Path, recordings: Recordings) -> Iterator[Utterance | Refusal]:
    """The directory's utterances, in its order. Commands in wav.scp are refused, never run.

    Raises:
        UserError: wav.scp or text is missing.
    """
    if not (folder / "wav.scp").is_file() or not (folder / "text").is_file():
        raise UserError(f"{folder}: is no Kaldi data directory with the files wav.scp and text")
    refused: list[Refusal] = []
    wav, text = (_table(folder / name, refused) for name in ("wav.scp", "text"))
    has_segments = (folder / "segments").is_file()
    utterances = _table(folder / "segments", refused) if has_segments else wav
    speakers = _table(folder / "utt2spk", refused)
    yield from refused
    for id, line in utterances.items():
        try:
            if id not in text:
                raise RowError(f"{id} has no text in {folder / 'text'}")
            audio = _segment(line.value, wav, recordings) if has_segments else _recording(id, wav, recordings)
        except RowError as error:
            yield Refusal(line.where, str(error))
            continue
        said, speaker = " ".join(text[id].value.split()), speakers[id].value if id in speakers else None
        yield Utterance(line.where, id, said, AudioPart(audio, text=said, speaker=speaker))
    yield from (Refusal(line.where, f"{id} has no recording") for id, line in text.items() if id not in utterances)


def _table(path: Path, refused: list[Refusal]) -> dict[str, _Line]:
    """Key -> the rest of its line; empty for a file that is not there."""
    table: dict[str, _Line] = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        key, value = (*line.split(maxsplit=1), "", "")[:2]
        where = f"{path}:{number}"
        if key in table or (key and not value):
            refused.append(Refusal(where, f"{key} {'stands twice' if key in table else 'has no value'}"))
        elif key:
            table[key] = _Line(where, value.strip())
    return table


def _recording(id: str, wav: dict[str, _Line], recordings: Recordings) -> str:
    if id not in wav:
        raise RowError(f"recording {id} is not in wav.scp")
    path = wav[id].value
    if path.endswith("|"):
        raise RowError(f"recording {id} is a command, and commands are not run; write what `{path}` gives to a file")
    return recordings.take(path)


def _segment(value: str, wav: dict[str, _Line], recordings: Recordings) -> str:
    """Cut a piece out of a recording and keep it as WAV."""
    try:
        id, start, end = value.split()[:3]
        start_s, end_s = float(start), float(end)
    except ValueError:
        raise RowError(f"must be `utterance recording start end`, with times in seconds, got {value!r}") from None
    path = recordings.output.parent / _recording(id, wav, recordings)
    try:
        with soundfile.SoundFile(path) as file:
            duration_s = file.frames / file.samplerate
            # -1 is the recording's end (extract-segments).
            end_s = duration_s if end_s == -1 else end_s
            if not 0 <= start_s < min(end_s, duration_s) or end_s > duration_s + _MAX_OVERSHOOT_S:
                raise RowError(f"{start_s:g} to {end_s:g} s is no piece of {path}, which has {duration_s:g} s")
            file.seek(round(start_s * file.samplerate))
            samples = file.read(round((end_s - start_s) * file.samplerate), dtype="int16")
            rate_hz = file.samplerate
    except soundfile.SoundFileError as error:
        raise RowError(f"{path}: cannot be read as audio: {error}") from None
    cut = io.BytesIO()
    soundfile.write(cut, samples, rate_hz, format="WAV", subtype="PCM_16")
    return recordings.keep(cut.getvalue(), ".wav")
