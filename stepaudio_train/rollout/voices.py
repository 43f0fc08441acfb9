"""Voices to speak in: a recording with what it says, a folder of named speakers, and what models are told of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from stepaudio_train.audio import read_audio
from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.audio.preprocessing import trim_silence
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.tags import AskedTag, Tag
from stepaudio_train.models.decoder.flow import FlowPrompt
from stepaudio_train.models.decoder.flow_files import SPEAKER_FILES
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens

SPEAKERS_FILE = "speakers_info.json"
_MUSIC = ("RAP", "singing")
_KEPT_VOICES = 64


@dataclass(frozen=True)
class ChosenVoice:
    """Whose voice a text is spoken in."""

    recording: Path | None = None
    text: str | None = None
    """What the recording says."""
    speaker: str | None = None
    """A name that the model was trained with; None to clone the recording's voice."""


def music_tag(asked: Sequence[AskedTag]) -> Tag | None:
    """The tag that asks for RAP or singing, which may have recordings and a decoder of their own."""
    return next((one.tag for one in asked if one.tag.english in _MUSIC), None)


def require_recording(recording: Path | None, decoder: Path) -> None:
    """See that a decoder in a directory is told whose voice it is to be.

    Raises:
        UserError: the recording is no file, or there is none and the decoder learned with a speaker encoder.
    """
    if recording is not None and not recording.is_file():
        raise UserError(f"{recording}: no such recording")
    if recording is None and any((decoder / name).is_file() for name in SPEAKER_FILES):
        raise UserError(f"{decoder}: speaks in the voice of a recording; type --voice FILE")


class SpeakersFolder:
    """Named speakers as released: speakers_info.json, {name: what the recording says}, and NAME_prompt.wav each.

    A speaker's RAP and singing are entries of their own, NAMERAP and NAME哼唱.
    """

    def __init__(self, folder: Path) -> None:
        """Raises:
        UserError: no such folder, or its list of speakers cannot be read.
        """
        self._file = folder / SPEAKERS_FILE
        try:
            self._texts: Mapping[str, str] = TypeAdapter(dict[str, str]).validate_json(self._file.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{self._file}: is no list {{name: what NAME_prompt.wav says}}: {error}") from error

    def voice(self, name: str, music: Tag | None = None) -> ChosenVoice:
        """A speaker's voice; for RAP or singing the entry for it, where there is one.

        Raises:
            UserError: no such speaker; the message names the nearest.
        """
        entry = name if music is None else f"{name}{music.chinese}"
        entry = entry if entry in self._texts else name
        if entry not in self._texts:
            near = difflib.get_close_matches(name, self._texts, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self._texts) or 'none'}"
            raise UserError(f"{self._file}: has no speaker {name!r}; {hint}")
        return ChosenVoice(self._file.parent / f"{entry}_prompt.wav", self._texts[entry], name)


class VoiceReader:
    """What the language model and the decoder are told of a recording. The last voices are kept."""

    def __init__(self, tokenizer: SpeechTokenizer | None) -> None:
        """
        Args:
            tokenizer: None: a decoder gets the voice alone, without tokens and mel to go on from.
        """
        self._tokenizer = tokenizer
        self.tokens = lru_cache(maxsize=_KEPT_VOICES)(self._tokens)
        self.flow_prompt = lru_cache(maxsize=_KEPT_VOICES)(self._flow_prompt)

    def _tokens(self, recording: Path) -> SpeechTokens:
        """The codes of a recording. Needs a tokenizer.

        Raises:
            AudioError: it cannot be read.
        """
        assert self._tokenizer is not None
        # As released: silent ends are cut off, and the level is normalised (formats.md 7).
        (speech,) = self._tokenizer.encode([trim_silence(read_audio(recording, SAMPLE_RATE_HZ))])
        return speech

    def _flow_prompt(self, recording: Path | None, decoder: SpeechDecoder) -> FlowPrompt:
        """What a decoder is told. Without a recording, as one is told that learned without a speaker encoder.

        Raises:
            UserError: the recording cannot be read, or is too short for a voice.
        """
        if recording is None:
            config = decoder.flow.config
            return FlowPrompt.of_speaker(torch.zeros(config.speaker_size), config.num_mel_bins)
        waveform = read_audio(recording, SAMPLE_RATE_HZ)
        try:
            voice = decoder.prompt(waveform)
            if self._tokenizer is None:
                return voice
            # The released program stretches the tokens of the trimmed recording over the mel of the untrimmed one. The
            # flow learns from tokens and mel of the same stretch of time, so here the mel is trimmed too, and the
            # embedding alone is of the whole.
            return replace(decoder.prompt(trim_silence(waveform), self.tokens(recording)), speaker=voice.speaker)
        except UserError as error:
            raise UserError(f"{recording}: {error}") from error
