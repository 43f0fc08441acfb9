"""`stepaudio decode`: audio tokens to sound, such as those that `stepaudio generate` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepaudio_train.commands.sound_files import (
    MadeSound,
    SoundFormat,
    SoundJob,
    SoundTarget,
    request_key,
    write_sounds,
)
from stepaudio_train.commands.speech_lines import TokensLine, read_lines
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.sources import Refusal
from stepaudio_train.models.decoder.flow import FlowPrompt
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.rollout.voices import VoiceReader, require_recording
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens

_BATCH_CLIPS = 16


@dataclass(frozen=True)
class DecodeOptions:
    """What `stepaudio decode` is asked for."""

    file: Path
    """JSONL of `TokensLine`s."""
    decoder: Path
    """Run directory of `stepaudio run flow`."""
    output: Path
    """Folder for ID.wav and decoded.jsonl."""
    vocoder: Path | None = None
    """Run directory of `stepaudio run vocoder`; None: its files are in `decoder`."""
    voice: Path | None = None
    """A recording of the voice, for lines that name none."""
    speech_tokenizer: Path | None = None
    """Directory of the tokenizer that the decoder was trained with: what is made then goes on from the voice's
    recording. None: it has the voice alone."""
    format: SoundFormat = "wav"
    sample_rate_hz: int | None = None
    """None: the decoder's."""
    device: str = "auto"


@dataclass(frozen=True)
class _Clip(SoundJob):
    """A line's codes, and the voice that is to speak them."""

    line: TokensLine
    speech: SpeechTokens
    recording: Path | None


def run_decoding(options: DecodeOptions) -> int:
    """Write a sound file for each line of tokens, and decoded.jsonl; the exit status.

    A row is the line, with `audio` (the file's name) and `duration_s`. Lines that are no whole groups of tokens are
    named and left out, and the status is then 1. What an earlier call of the same command has finished is not made
    again.

    Raises:
        UserError: a decoder or tokenizer that cannot be used, or a folder with what another command made.
    """
    clips: list[_Clip] = []
    refused: list[Refusal] = []
    for found in read_lines(options.file, TokensLine):
        if isinstance(found, Refusal):
            refused.append(found)
            continue
        line = found.line
        recording = options.voice if line.voice is None else found.folder / line.voice
        try:
            require_recording(recording, options.decoder)
            speech = line.speech()
        except (UserError, ValueError) as error:
            refused.append(Refusal(found.where, str(error)))
            continue
        settings = (options.decoder, options.vocoder, options.speech_tokenizer, options.format, options.sample_rate_hz)
        clips.append(_Clip(line.id, found.where, request_key(settings, vars(line), recording), line, speech, recording))
    target = SoundTarget(options.output, "decoded", options.format, options.sample_rate_hz)
    return write_sounds(target, clips, refused, lambda waiting: _decoded(waiting, options))


def _decoded(clips: Sequence[_Clip], options: DecodeOptions) -> Iterator[MadeSound | UserError]:
    tokenizer = options.speech_tokenizer
    voices = VoiceReader(None if tokenizer is None else SpeechTokenizer.from_directory(tokenizer, options.device))
    decoder = SpeechDecoder.from_directory(options.decoder, options.vocoder, device=options.device)
    for start in range(0, len(clips), _BATCH_CLIPS):
        batch = clips[start : start + _BATCH_CLIPS]
        prompts: dict[str, FlowPrompt] = {}
        results: dict[str, MadeSound | UserError] = {}
        for clip in batch:
            try:
                prompts[clip.id] = voices.flow_prompt(clip.recording, decoder)
            except UserError as error:
                results[clip.id] = error
        usable = [clip for clip in batch if clip.id in prompts]
        sounds = decoder.decode([clip.speech for clip in usable], list(prompts.values()))
        for clip, samples in zip(usable, sounds, strict=True):
            results[clip.id] = MadeSound(samples, decoder.sample_rate_hz, vars(clip.line))
        yield from (results[clip.id] for clip in batch)
