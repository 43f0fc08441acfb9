"""A trained speech-text model as one object: audio in, text out; text in, audio tokens out; audio continued.

Prompts come from the one renderer, so that a model is served with what it was trained on. Waveforms become tokens by a
`SpeechTokenizer` and audio tokens become waveforms by a vocoder: neither is needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stepaudio_train.config.schema import SpeechLayout
from stepaudio_train.config.sft import ChatHistory, ChatTemplate
from stepaudio_train.data.records import AudioPart, speech_record
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.engines.precision import choose_device
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.rollout.generate import Generation, generate
from stepaudio_train.rollout.sampling import ANSWER_ENDS, SamplingConfig
from stepaudio_train.tokenizers.dual import LINGUISTIC_PER_GROUP, TOKENS_PER_GROUP, split_streams
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import FIRST_BYTE_ID, Special, Vocabulary

TOKENIZER_FILE = "tokenizer.model"
_AUDIO_NAME = "audio"
_END_OF_TEXT = (int(Special.TEXT_END), int(Special.EOS))
_END_OF_AUDIO = (int(Special.AUDIO_END), int(Special.EOS))


@dataclass(frozen=True)
class Answer:
    """What the assistant said."""

    text: str
    speech: SpeechTokens | None
    """None if it said nothing aloud."""
    ended: bool
    """Whether it ended its turn itself."""


class SpeechTextModel:
    """A model, its vocabulary and its renderer."""

    def __init__(self, model: Step1ForCausalLM, renderer: Renderer, batch_rows: int = 64) -> None:
        self.model, self.renderer, self.batch_rows = model, renderer, batch_rows

    @classmethod
    def from_directory(
        cls, directory: str | Path, device: str = "auto", speech_layout: SpeechLayout = "interleaved"
    ) -> SpeechTextModel:
        """Read an `export/` folder: config.json, safetensors, tokenizer.model.

        The audio ids follow the text ids, as in every vocabulary of this project. How many text ids there are is told
        by the text tokenizer: the released one holds the audio ids too, from `<audio_0>` on.

        Raises:
            FileNotFoundError: a file is missing; the message says which.
            ValueError: model and text tokenizer do not fit each other.
        """
        directory = Path(directory)
        tokenizer_file = directory / TOKENIZER_FILE
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{directory}: holds no config.json; type the export/ folder of a finished run")
        if not tokenizer_file.is_file():
            raise FileNotFoundError(
                f"{directory}: holds no {TOKENIZER_FILE}; train with vocabulary.text_tokenizer=FILE, or copy it there"
            )
        tokenizer = TextTokenizer.from_file(tokenizer_file)
        model = Step1ForCausalLM.from_pretrained(directory).to(choose_device(device))
        vocabulary = _vocabulary(tokenizer, model.config.vocab_size, directory)
        return cls(model, Renderer(vocabulary, tokenizer, speech_layout))

    def transcribe(self, samples: Sequence[TokenSample], max_new_tokens: int = 128) -> list[str]:
        """What is said in each sample's recording, by greedy decoding. Transcripts in the samples are not looked at."""
        prompts = [self.renderer.render_prompt(sample, "asr").tolist() for sample in samples]
        config = SamplingConfig(max_new_tokens=max_new_tokens, stop_ids=_END_OF_TEXT)
        return [self._text(generation) for generation in self._generate(prompts, config)]

    def speak(
        self, texts: Sequence[str], config: SamplingConfig, seeds: Sequence[int] | None = None
    ) -> list[SpeechTokens]:
        """Speech tokens for each text; `config.stop_ids` is set here."""
        return [self._speech(generation) for generation in self._spoken(texts, config, seeds)]

    def read_aloud(
        self, texts: Sequence[str], config: SamplingConfig, seeds: Sequence[int] | None = None
    ) -> list[Answer]:
        """As `speak`, and whether each reading ended by itself."""
        return [
            Answer("", self._speech(generation), generation.stop_id == Special.AUDIO_END)
            for generation in self._spoken(texts, config, seeds)
        ]

    def continue_speech(
        self, speech: Sequence[SpeechTokens], config: SamplingConfig, seeds: Sequence[int] | None = None
    ) -> list[SpeechTokens]:
        """What the model says after each piece of speech, without the piece; `config.stop_ids` is set here."""
        samples = [as_sample(tokens) for tokens in speech]
        prompts = [self.renderer.render_prompt(sample, "continuation").tolist() for sample in samples]
        return [self._speech(g) for g in self._generate(prompts, replace(config, stop_ids=_END_OF_AUDIO), seeds)]

    def answer(
        self,
        samples: Sequence[TokenSample],
        config: SamplingConfig,
        template: ChatTemplate = "tts",
        history: ChatHistory = "text",
        seeds: Sequence[int] | None = None,
    ) -> list[Answer]:
        """The assistant's next turn in each conversation; a last answer in it is not looked at. `config.stop_ids` is
        set here.

        Raises:
            RenderError: a conversation that cannot be rendered.
        """
        prompts = [self.renderer.render_chat_prompt(sample, template, history).tolist() for sample in samples]
        return [self._answer(g) for g in self._generate(prompts, replace(config, stop_ids=ANSWER_ENDS), seeds)]

    def _answer(self, generation: Generation) -> Answer:
        first_audio, end = self.renderer.vocabulary.linguistic_offset, self.renderer.vocabulary.audio_end
        audio = [index for index in generation.ids if first_audio <= index < end]
        speech = self._speech(replace(generation, ids=audio)) if audio else None
        return Answer(self._text(generation), speech, generation.stop_id == Special.EOT)

    def _spoken(self, texts: Sequence[str], config: SamplingConfig, seeds: Sequence[int] | None) -> list[Generation]:
        records = [speech_record(str(index), AudioPart(_AUDIO_NAME, text=text)) for index, text in enumerate(texts)]
        prompts = [self.renderer.render_prompt(TokenSample(record), "tts").tolist() for record in records]
        return self._generate(prompts, replace(config, stop_ids=_END_OF_AUDIO), seeds)

    def _generate(
        self, prompts: list[list[int]], config: SamplingConfig, seeds: Sequence[int] | None = None
    ) -> list[Generation]:
        return generate(self.model, prompts, config, seeds, self.batch_rows)

    def _text(self, generation: Generation) -> str:
        return written_text(generation.ids, self.renderer)

    def _speech(self, generation: Generation) -> SpeechTokens:
        """The audio up to the first id that breaks the 2:3 order, in whole groups."""
        if self.renderer.speech_layout != "interleaved":
            raise ValueError(f"a model of {self.renderer.speech_layout} speech tokens does not speak")
        vocabulary = self.renderer.vocabulary
        ids = np.asarray(generation.ids, np.int64)
        linguistic = np.arange(len(ids)) % TOKENS_PER_GROUP < LINGUISTIC_PER_GROUP
        lowest = np.where(linguistic, vocabulary.linguistic_offset, vocabulary.semantic_offset)
        highest = np.where(linguistic, vocabulary.semantic_offset, vocabulary.audio_end)
        broken = np.flatnonzero((ids < lowest) | (ids >= highest))
        first, second = split_streams(ids[: broken[0]] if len(broken) else ids, vocabulary)
        return SpeechTokens(first.astype(np.int32), second.astype(np.int32))


def written_text(ids: Sequence[int], renderer: Renderer) -> str:
    """What is written in an answer."""
    # Audio and control ids in a transcript are mistakes that no text can stand for.
    kept = [index for index in ids if FIRST_BYTE_ID <= index < renderer.vocabulary.text_size]
    return renderer.text_tokenizer.decode(kept).strip()


def as_sample(speech: SpeechTokens, id: str = "speech") -> TokenSample:
    """Bare speech tokens as something the renderer takes."""
    return TokenSample(speech_record(id, AudioPart(_AUDIO_NAME)), {_AUDIO_NAME: speech})


def _vocabulary(tokenizer: TextTokenizer, vocab_size: int, directory: Path) -> Vocabulary:
    text_size = tokenizer.text_size
    vocabulary = Vocabulary(text_size, reserved_size=0)
    reserved = vocab_size - vocabulary.total_size
    if reserved < 0:
        raise ValueError(
            f"{directory}: config.json has vocab_size={vocab_size}, but {TOKENIZER_FILE}'s {text_size} text ids "
            f"and the audio ids are {vocabulary.total_size}; the two files are not of one model"
        )
    return replace(vocabulary, reserved_size=reserved)
