"""`stepaudio synthesize`: text to sound, by a language model that speaks in tokens and a decoder (paper 3.3, 5.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stepaudio_train.commands.evaluate import fine_tuning_data
from stepaudio_train.commands.sound_files import (
    MadeSound,
    SoundFormat,
    SoundJob,
    SoundTarget,
    request_key,
    write_sounds,
)
from stepaudio_train.commands.speech_lines import FileLine, TextLine, read_lines
from stepaudio_train.config.compose import read_config
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.config.sft import ChatTemplate, SftDataConfig
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.tags import AskedTag, TagVocabulary
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.rollout.speech_text import SpeechTextModel
from stepaudio_train.rollout.synthesis import RELEASED_SAMPLING, SPEAKER_MARK, PromptForm, Sound, Synthesizer, Utterance
from stepaudio_train.rollout.voices import ChosenVoice, SpeakersFolder, VoiceReader, music_tag, require_recording
from stepaudio_train.tokenizers.dual import audio_ids_to_text, merge_streams
from stepaudio_train.tokenizers.speech import SpeechTokenizer
from stepaudio_train.tokenizers.vocabulary import AUDIO_IDS

_BATCH_TEXTS = 16
_NOT_OF_ALL = ("output", "texts", "records", "voice", "voice_text", "speaker", "seed", "device")
"""Options that change no sound, or are those of each text."""


@dataclass(frozen=True)
class SynthesizeOptions:
    """What `stepaudio synthesize` is asked for."""

    model: Path
    """A run directory of `sft` or `pretrain`, its export/ folder, or a Hugging Face directory such as the released
    Step-Audio-TTS-3B, which is asked as a fine-tuned one."""
    decoder: Path
    """Run directory of `stepaudio run flow`."""
    output: Path
    """Folder for ID.wav and synthesized.jsonl."""
    texts: tuple[str, ...] = ()
    records: Path | None = None
    """JSONL of `TextLine`s."""
    vocoder: Path | None = None
    """Run directory of `stepaudio run vocoder`; None: its files are beside each decoder's."""
    music_decoder: Path | None = None
    """For RAP and singing; None: `decoder`, which then speaks them too."""
    voice: Path | None = None
    """A recording of the voice."""
    voice_text: str | None = None
    """What `voice` says."""
    speakers: Path | None = None
    """Folder of named speakers in the released layout (`SpeakersFolder`)."""
    speaker: str | None = None
    """Name in the system prompt, and in `speakers`."""
    speech_tokenizer: Path | None = None
    """Directory of the tokenizer that the model was trained with; None: the one in a fine-tuned run's configuration."""
    template: ChatTemplate | None = None
    """None: the run's, and tts for a Hugging Face directory."""
    system: str | None = None
    """System prompt in which `{speaker}` stands for the name, for models that learned without a recording before the
    text. None: the released prompt of two rounds."""
    max_new_tokens: int = 2048
    temperature: float = 0.7
    top_k: int = 50
    """As transformers has it, with which the released program runs."""
    seed: int = 0
    format: SoundFormat = "wav"
    sample_rate_hz: int | None = None
    """None: the decoder's."""
    device: str = "auto"


@dataclass(frozen=True)
class _Request(SoundJob):
    """A text to be spoken, and where it stands."""

    utterance: Utterance


def run_synthesis(options: SynthesizeOptions) -> int:
    """Write a sound file for each text, and synthesized.jsonl; the exit status.

    A row has `id`, `text` (the words), `tags`, `speaker`, `audio` (the file's name), `duration_s`, `seed`, `ended`
    (whether the model ended by itself) and `audio_tokens`. Texts that cannot be used are named and left out, and the
    status is then 1. What an earlier call of the same command has finished is not made again.

    Raises:
        UserError: no text, a model, tokenizer, decoder or folder of speakers that cannot be used, or options that do
            not go together.
    """
    try:
        return _run(options)
    except ValueError as error:  # of files and settings that do not fit each other
        raise UserError(str(error)) from error


def _run(options: SynthesizeOptions) -> int:
    data = _how_asked(options.model)
    requests, refused = _requests(options, data)
    target = SoundTarget(options.output, "synthesized", options.format, options.sample_rate_hz)
    return write_sounds(target, requests, refused, lambda waiting: _spoken(waiting, options, data))


def _how_asked(model: Path) -> SftDataConfig | None:
    """How a fine-tuned model is asked, which a directory without a run's configuration is taken for; None: a pretrained
    one."""
    run = model.parent if model.name == "export" and (model.parent / "config.yaml").is_file() else model
    if not (run / "config.yaml").is_file():
        return SftDataConfig()
    try:
        read_config(PretrainConfig, run / "config.yaml")
    except ConfigError:
        return fine_tuning_data(run)
    return None


def _requests(options: SynthesizeOptions, data: SftDataConfig | None) -> tuple[list[_Request], list[Refusal]]:
    """What is asked for, and the lines that cannot be used."""
    if bool(options.texts) == (options.records is not None):
        raise UserError("type the texts to be spoken, or --records FILE.jsonl, and not both")
    if options.voice is not None and options.speakers is not None:
        raise UserError("--voice and --speakers both say whose voice it is to be; type one of them")
    tags = TagVocabulary(data.own_tags if data is not None else ())
    speakers = None if options.speakers is None else SpeakersFolder(options.speakers)
    typed = [
        FileLine(f"text_{number + 1}", number, TextLine(f"text_{number + 1}", text))
        for number, text in enumerate(options.texts)
    ]
    settings = {name: value for name, value in asdict(options).items() if name not in _NOT_OF_ALL}
    requests, refused = [], []
    for found in typed if options.records is None else read_lines(options.records, TextLine):
        if isinstance(found, Refusal):
            refused.append(found)
            continue
        try:
            asked, words = tags.parse(found.line.text)
            voice = _voice(found, options, speakers, asked)
            utterance = Utterance(found.line.id, found.line.text, words, asked, voice, options.seed + found.number)
            _require_usable(utterance, options, data)
        except UserError as error:
            refused.append(Refusal(found.where, str(error)))
        else:
            key = request_key(settings, asdict(utterance))
            requests.append(_Request(utterance.id, found.where, key, utterance))
    return requests, refused


def _voice(
    found: FileLine[TextLine], options: SynthesizeOptions, speakers: SpeakersFolder | None, asked: Sequence[AskedTag]
) -> ChosenVoice:
    line = found.line
    if line.voice is not None:
        return ChosenVoice(found.folder / line.voice, line.voice_text, line.speaker)
    name = line.speaker or options.speaker
    if speakers is None:
        return ChosenVoice(options.voice, options.voice_text, name)
    if name is None:
        raise UserError("names no speaker; type --speaker NAME, one of those in --speakers")
    return speakers.voice(name, music_tag(asked))


def _require_usable(utterance: Utterance, options: SynthesizeOptions, data: SftDataConfig | None) -> None:
    """Raises:
    UserError: the text or its voice lack something.
    """
    voice = utterance.voice
    if not utterance.words.strip():
        raise UserError("text: holds no words")
    require_recording(voice.recording, options.decoder)
    if data is None:
        if utterance.asked:
            raise UserError(f"{utterance.text!r}: a pretrained model knows no instruction tags; take a fine-tuned one")
    elif options.system is None:
        if voice.recording is None or not voice.text:
            raise UserError(
                "the released prompt begins with a recording and what it says; type --voice FILE --voice-text TEXT, or "
                "--speakers DIR (a model that learned without: --system TEXT)"
            )
    elif SPEAKER_MARK in options.system and voice.speaker is None:
        raise UserError(f"--system has {SPEAKER_MARK}; type --speaker NAME")


def _spoken(
    requests: Sequence[_Request], options: SynthesizeOptions, data: SftDataConfig | None
) -> Iterator[MadeSound | UserError]:
    synthesizer = _synthesizer(requests, options, data)
    for start in range(0, len(requests), _BATCH_TEXTS):
        utterances = [request.utterance for request in requests[start : start + _BATCH_TEXTS]]
        for utterance, result in zip(utterances, synthesizer.speak(utterances), strict=True):
            yield result if isinstance(result, UserError) else _with_row(utterance, result, options)


def _synthesizer(requests: Sequence[_Request], options: SynthesizeOptions, data: SftDataConfig | None) -> Synthesizer:
    form = None if data is None else PromptForm(options.template or data.template, options.system)
    directory = options.speech_tokenizer or (None if data is None else data.speech_tokenizer)
    if directory is None and form is not None and form.system is None:
        raise UserError("the prompt begins with a recording's tokens; type --speech-tokenizer DIR, the model's own")
    voices = VoiceReader(None if directory is None else SpeechTokenizer.from_directory(directory, options.device))
    export = options.model / "export"
    model = SpeechTextModel.from_directory(export if export.is_dir() else options.model, options.device)
    decoder = SpeechDecoder.from_directory(options.decoder, options.vocoder, device=options.device)
    music_decoder = None
    if options.music_decoder is not None and any(music_tag(request.utterance.asked) for request in requests):
        music_decoder = SpeechDecoder.from_directory(options.music_decoder, options.vocoder, device=options.device)
    sampling = replace(
        RELEASED_SAMPLING,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
    )
    return Synthesizer(model, form, sampling, decoder, music_decoder, voices)


def _with_row(utterance: Utterance, sound: Sound, options: SynthesizeOptions) -> MadeSound:
    ids = merge_streams(sound.speech.linguistic, sound.speech.semantic, AUDIO_IDS)
    row = {
        "id": utterance.id,
        "text": utterance.words,
        "tags": [one.spell("en") for one in utterance.asked],
        **({} if utterance.voice.speaker is None else {"speaker": utterance.voice.speaker}),
        "seed": utterance.seed,
        "ended": sound.ended,
        "audio_tokens": audio_ids_to_text(ids, AUDIO_IDS),
    }
    warning = None if sound.ended else f"did not end within {options.max_new_tokens} tokens"
    return MadeSound(sound.samples, sound.sample_rate_hz, row, warning)
