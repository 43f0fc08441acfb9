"""`stepaudio resynthesize`: recordings to tokens and back to sound, to hear what the tokens and the decoder keep."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio import AudioError, read_audio
from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.commands.sound_files import SoundFormat, write_sound
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.sources import AUDIO_SUFFIXES
from stepaudio_train.models.decoder.flow import FlowPrompt
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder, audio_ids
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens

_BATCH_RECORDINGS = 16


@dataclass(frozen=True)
class ResynthesizeOptions:
    """What `stepaudio resynthesize` is asked for."""

    sources: tuple[Path, ...]
    """Recordings, and folders of them."""
    decoder: Path
    """Run directory of `stepaudio run flow`."""
    speech_tokenizer: Path
    """Directory of the tokenizer that the decoder was trained with."""
    output: Path
    """Folder for the results, named like the recordings."""
    vocoder: Path | None = None
    """Run directory of `stepaudio run vocoder`; None: its files are in `decoder`."""
    format: SoundFormat = "wav"
    sample_rate_hz: int | None = None
    """None: the decoder's."""
    device: str = "auto"


def run_resynthesis(options: ResynthesizeOptions) -> int:
    """Write each recording as the decoder speaks its tokens, in its own voice; the exit status.

    Recordings that cannot be used are named and left out, and the status is then 1.

    Raises:
        UserError: no recordings, two that would have one name, or a decoder or tokenizer that cannot be used.
    """
    targets = _targets(options)
    tokenizer = SpeechTokenizer.from_directory(options.speech_tokenizer, options.device)
    decoder = SpeechDecoder.from_directory(options.decoder, options.vocoder, device=options.device)
    sources, refused = list(targets), 0
    with tqdm(total=len(sources), unit="recording", desc="resynthesize", dynamic_ncols=True) as bar:
        for start in range(0, len(sources), _BATCH_RECORDINGS):
            batch = sources[start : start + _BATCH_RECORDINGS]
            for source, result in zip(batch, _resynthesised(batch, tokenizer, decoder), strict=True):
                if isinstance(result, UserError):
                    refused += 1
                    bar.write(f"left out: {result}", sys.stderr)
                else:
                    write_sound(targets[source], result, decoder.sample_rate_hz, options.sample_rate_hz)
                bar.update()
    return 1 if refused else 0


def _targets(options: ResynthesizeOptions) -> dict[Path, Path]:
    """Every recording, and the file it becomes."""
    targets: dict[Path, Path] = {}
    for source in options.sources:
        if source.is_dir():
            found = sorted(path for path in source.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
            named = {path: path.relative_to(source) for path in found}
        else:
            named = {source: Path(source.name)}
        targets |= {path: (options.output / name).with_suffix(f".{options.format}") for path, name in named.items()}
    if not targets:
        raise UserError(f"{', '.join(map(str, options.sources))}: no recordings in it; give audio files or folders")
    taken = Counter(targets.values())
    for path, target in targets.items():
        if taken[target] > 1:
            raise UserError(f"{path}: would become {target}, and another recording too; give them in turn")
        if target.resolve() == path.resolve():
            raise UserError(f"{path}: would be written over; type another --output")
    return targets


def _resynthesised(sources: list[Path], tokenizer: SpeechTokenizer, decoder: SpeechDecoder) -> list[Tensor | UserError]:
    """[samples] of each recording, or why it cannot be used."""
    results: dict[Path, Tensor | UserError] = {}
    waveforms: dict[Path, Tensor] = {}
    for source in sources:
        try:
            waveforms[source] = read_audio(source, SAMPLE_RATE_HZ)
        except AudioError as error:
            results[source] = error
    clips: dict[Path, tuple[SpeechTokens, FlowPrompt]] = {}
    for (source, waveform), speech in zip(waveforms.items(), tokenizer.encode(list(waveforms.values())), strict=True):
        try:
            audio_ids(speech)
            clips[source] = speech, decoder.prompt(waveform)
        except UserError as error:
            results[source] = UserError(f"{source}: {error}")
    decoded = decoder.decode([speech for speech, _ in clips.values()], [prompt for _, prompt in clips.values()])
    results |= dict(zip(clips, decoded, strict=True))
    return [results[source] for source in sources]
