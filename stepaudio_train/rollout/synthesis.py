"""Text to sound: a language model that speaks in tokens, and a decoder that makes them heard (paper 3.3, 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.sft import ChatTemplate
from stepaudio_train.data.prompts import Voice, synthesis_record
from stepaudio_train.data.records import AudioPart, Message, Record, TextPart
from stepaudio_train.data.render import TokenSample
from stepaudio_train.data.tags import AskedTag
from stepaudio_train.models.decoder.flow import FlowPrompt
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import Answer, SpeechTextModel
from stepaudio_train.rollout.voices import ChosenVoice, VoiceReader, music_tag
from stepaudio_train.tokenizers.speech import SpeechTokens

SPEAKER_MARK = "{speaker}"
RELEASED_SAMPLING = SamplingConfig(max_new_tokens=2048, temperature=0.7, top_k=50, repetition_window=10)
"""As StepFun's tts.py draws (formats.md 7; top_k is transformers' default). It allows 8,192 tokens, prompt included."""


@dataclass(frozen=True)
class PromptForm:
    """How a fine-tuned model is asked to speak."""

    template: ChatTemplate = "tts"
    system: str | None = None
    """A system prompt with nothing but the text behind it, `{speaker}` in it the voice's name, for models that learned
    without a recording before the text. None: the released prompt of two rounds, which begins with the recording."""


@dataclass(frozen=True)
class Utterance:
    """A text to be spoken."""

    id: str
    text: str
    words: str
    """The text without its tags."""
    asked: tuple[AskedTag, ...]
    voice: ChosenVoice
    seed: int


@dataclass(frozen=True)
class Sound:
    """What a text became."""

    speech: SpeechTokens
    ended: bool
    """Whether the model ended by itself."""
    samples: Tensor
    """[N] float32."""
    sample_rate_hz: int


@dataclass(frozen=True)
class _Prepared:
    """An utterance as the models take it."""

    utterance: Utterance
    sample: TokenSample
    decoder: SpeechDecoder
    prompt: FlowPrompt


class Synthesizer:
    """The models and the voices. What an utterance becomes depends on itself and its seed, not on its neighbours."""

    def __init__(
        self,
        model: SpeechTextModel,
        form: PromptForm | None,
        sampling: SamplingConfig,
        decoder: SpeechDecoder,
        music_decoder: SpeechDecoder | None,
        voices: VoiceReader,
    ) -> None:
        """
        Args:
            form: None: a pretrained model, asked by the text-to-speech task of its pretraining.
            music_decoder: for RAP and singing; None: `decoder` makes them too.
            voices: with a tokenizer, which the released form needs.
        """
        self._model, self._form, self._sampling = model, form, sampling
        self._decoder, self._music_decoder, self._voices = decoder, music_decoder or decoder, voices

    def speak(self, utterances: Sequence[Utterance]) -> list[Sound | UserError]:
        """All of them at once; for each its sound, or why there is none."""
        results: dict[int, Sound | UserError] = {}
        prepared: dict[int, _Prepared] = {}
        for place, utterance in enumerate(utterances):
            try:
                prepared[place] = self._prepared(utterance)
            except UserError as error:
                results[place] = error
        answers = dict(zip(prepared, self._answers(list(prepared.values())), strict=True))
        for decoder in {id(one.decoder): one.decoder for one in prepared.values()}.values():
            spoken: dict[int, SpeechTokens] = {}
            for place, one in prepared.items():
                speech = answers[place].speech
                if one.decoder is decoder and speech is not None and len(speech.semantic):
                    spoken[place] = speech
            sounds = decoder.decode(list(spoken.values()), [prepared[place].prompt for place in spoken])
            for (place, speech), samples in zip(spoken.items(), sounds, strict=True):
                results[place] = Sound(speech, answers[place].ended, samples, decoder.sample_rate_hz)
        nothing = UserError("the model's answer holds no speech: not one whole group of audio tokens")
        return [results.get(place, nothing) for place in range(len(utterances))]

    def _prepared(self, utterance: Utterance) -> _Prepared:
        """Raises:
        UserError: the text or the voice's recording cannot be used.
        """
        decoder = self._decoder if music_tag(utterance.asked) is None else self._music_decoder
        sample = self._sample(utterance)
        if self._form is not None:
            self._model.renderer.render_chat_prompt(sample, self._form.template)
        return _Prepared(utterance, sample, decoder, self._voices.flow_prompt(utterance.voice.recording, decoder))

    def _sample(self, utterance: Utterance) -> TokenSample:
        voice = utterance.voice
        if self._form is not None and self._form.system is None:
            if voice.recording is None or voice.text is None:
                raise UserError("the released prompt begins with a recording of the voice and what it says")
            name = str(voice.recording)
            speaker = Voice(voice.text, AudioPart(name), voice.speaker)
            record = synthesis_record(utterance.id, utterance.text, speaker, utterance.asked)
            return TokenSample(record, {name: self._voices.tokens(voice.recording)})
        turns = [Message("human", (TextPart(utterance.text),))]
        if self._form is not None and self._form.system:
            system = self._form.system.replace(SPEAKER_MARK, voice.speaker or "")
            turns.insert(0, Message("system", (TextPart(system),)))
        return TokenSample(Record(utterance.id, tuple(turns), task="tts"))

    def _answers(self, prepared: Sequence[_Prepared]) -> list[Answer]:
        seeds = [one.utterance.seed for one in prepared]
        if self._form is None:
            return self._model.read_aloud([one.utterance.words for one in prepared], self._sampling, seeds)
        samples = [one.sample for one in prepared]
        return self._model.answer(samples, self._sampling, self._form.template, seeds=seeds)
