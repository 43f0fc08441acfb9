"""Answers are scored by task, and the control exchanges what is heard, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepaudio_train.data.conversation_files import EncodedConversations
from stepaudio_train.data.prompts import question_record, recognition_record
from stepaudio_train.data.records import AudioPart, Message, Part, Record, TextPart, ToolCall
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.sources import Refusal
from stepaudio_train.evaluation.answers import (
    Answered,
    answer_all,
    answerable,
    score,
    spoken_line,
    with_exchanged_audio,
)
from stepaudio_train.rollout import speech_text
from stepaudio_train.rollout.generate import Generation
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import Answer, SpeechTextModel
from stepaudio_train.testing.token_data import write_text_tokenizer
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Special, Vocabulary

WORDS = ("one", "two", "three", "four", "five", "six")
CODES = {word: SpeechTokens(np.full(2, i, np.int32), np.full(3, i, np.int32)) for i, word in enumerate(WORDS)}


def heard(word: str, task: str = "aqta") -> TokenSample:
    make = question_record if task == "aqta" else recognition_record
    return TokenSample(make(f"{task}_{word}", AudioPart(f"{word}.wav"), word), {f"{word}.wav": CODES[word]})


def spoken(word: str) -> TokenSample:
    turns = (Message("human", (TextPart(f"(fast 2){word}"),)), Message("assistant", (AudioPart(f"{word}.wav"),)))
    record = Record(f"tts_{word}", turns, {"text": word, "tags": ["fast 2"], "speaker": "ann"}, "tts")
    return TokenSample(record, {f"{word}.wav": CODES[word]})


class Listener:
    """Answers with the word whose codes it hears; written ones must be greedy, spoken ones drawn."""

    def answer(self, samples, config, template, history, seeds):
        answers = []
        for sample, _ in zip(samples, seeds, strict=True):
            part = sample.record.messages[-2].content[0]
            assert (config.temperature == 0) == isinstance(part, AudioPart)
            if isinstance(part, AudioPart):
                answers.append(Answer(WORDS[int(sample.speech[part.audio].semantic[0])], None, True))
            else:
                answers.append(Answer("", CODES["six"], False))
        return answers


def test_answers_are_scored_beside_exchanged_recordings():
    samples = [heard(word) for word in WORDS] + [heard(word, "asr") for word in WORDS[:4]] + [spoken("one")]
    sampling = SamplingConfig(16, temperature=0.7)
    answered = answer_all(Listener(), samples, sampling, "tts", "text")
    assert [one.sample for one in answered] == samples
    found = score(answered)
    assert set(found) == {"aqta", "asr"} and found["aqta"].num == 6 and found["asr"].num == 4
    assert found["aqta"].exact == found["asr"].exact == 100 and found["asr"].wer == 0
    exchanged = with_exchanged_audio(samples)
    assert len(exchanged) == 10  # what is not heard cannot be exchanged
    control = score(answer_all(Listener(), exchanged, sampling, "tts", "text"))
    assert control["aqta"].exact == control["asr"].exact == 0 and control["asr"].wer == 100
    for sample in exchanged:
        original = next(one for one in samples if one.record.id == sample.record.id)
        assert sample.record.messages[0] == original.record.messages[0]
        assert sample.record.messages[-1] == original.record.messages[-1]


def test_recordings_are_exchanged_within_a_task():
    samples = [heard(word) for word in WORDS[:3]] + [heard(word, "asr") for word in WORDS[3:]]
    for sample in with_exchanged_audio(samples):
        given = sample.record.messages[1].content[0].audio.removesuffix(".wav")
        assert (given in WORDS[:3]) == (sample.record.task == "aqta") and not sample.record.id.endswith(given)
    assert with_exchanged_audio([heard("one")]) == []


def test_wrong_and_half_right_answers():
    samples = [heard("one"), heard("two")]
    answered = [Answered(samples[0], Answer("One.", None, True)), Answered(samples[1], Answer("two two", None, True))]
    (scores,) = score(answered).values()
    assert scores.exact == 50 and scores.wer == pytest.approx(50)


def test_lines_tell_what_was_asked_for():
    vocabulary = Vocabulary(400, reserved_size=0)
    sample = spoken("two")
    line = Answered(sample, Answer("", CODES["three"], True)).line(vocabulary)
    assert (
        line["tags"] == ["fast 2"] and line["audio_tokens"] == "<audio_2><audio_2><audio_1026><audio_1026><audio_1026>"
    )
    truth = spoken_line(sample, Path("/clips"), vocabulary)
    assert truth["audio"] == "/clips/two.wav" and truth["audio_tokens"].startswith("<audio_1><audio_1><audio_1025>")
    silent = replace(sample, speech={})
    assert "audio_tokens" not in Answered(silent, Answer("x", None, True)).line(vocabulary)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory) -> Renderer:
    tokenizer = TextTokenizer.from_file(write_text_tokenizer(tmp_path_factory.mktemp("text") / "text.model"))
    return Renderer(Vocabulary(tokenizer.size, reserved_size=0), tokenizer)


def asked(id: str, question: list[Part], answer: list[Part] | None = None, **fields: Any) -> TokenSample:
    """A question, and its answer if it has one, with the codes of what is heard."""
    turns = (Message("human", tuple(question)),)
    if answer is not None:
        turns += (Message("assistant", tuple(answer)),)
    parts = [part for turn in turns for part in turn.content if isinstance(part, AudioPart)]
    codes = {part.audio: CODES[part.audio.removesuffix(".wav")] for part in parts}
    return TokenSample(Record(id, turns, **fields), codes)


def taqta(word: str, *answer: Part) -> TokenSample:
    question = [TextPart("what comes next? "), AudioPart(f"{word}.wav", text=word)]
    return asked(f"taqta_{word}", question, list(answer), task="taqta")


CALL = ToolCall("add", {"a": 1, "b": "二"})


@pytest.mark.parametrize(
    ("sample", "reference"),
    [
        (taqta("one", TextPart("two three")), "one\ntwo three"),
        (taqta("one", TextPart("one\ntwo three")), "one\ntwo three"),
        (asked("c1", [TextPart("one two")], [CALL]), 'function\nadd\n{"a": 1, "b": "二"}'),
        (asked("c2", [TextPart("one")], [TextPart("four"), CALL]), 'four function\nadd\n{"a": 1, "b": "二"}'),
    ],
)
def test_a_reference_is_what_a_model_that_learned_it_by_heart_answers(monkeypatch, renderer, sample, reference):
    """TAQTA's transcript is part of it; a call's control pieces are not, since no text holds them."""
    taught = renderer.render_chat(sample, "chat").ids.tolist()

    def recite(model, prompts, config, seeds, batch_rows):
        return [Generation(taught[len(prompt) : -1], int(Special.EOT)) for prompt in prompts]

    monkeypatch.setattr(speech_text, "generate", recite)
    model = SpeechTextModel(None, renderer)
    (answered,) = answer_all(model, [sample], SamplingConfig(64), "chat", "text")
    assert answered.answer == Answer(reference, None, True) and answered.reference == reference
    (scores,) = score([answered]).values()
    assert (scores.num, scores.exact, scores.wer) == (1, 100, 0)


def test_calls_with_other_arguments_are_not_the_same():
    sample = asked("c1", [TextPart("one two")], [CALL])
    other = Answer('function\nadd\n{"a": 7, "b": "二"}', None, True)
    (scores,) = score([Answered(sample, other)]).values()
    assert scores.exact == 0 and 0 < scores.wer < 100


def test_exchanged_recordings_leave_the_reference_as_it_is():
    samples = [taqta(word, TextPart(following)) for word, following in pairwise(WORDS)]
    exchanged = {sample.record.id: sample for sample in with_exchanged_audio(samples)}
    assert len(exchanged) == len(samples) == 5
    for sample in samples:
        other, nothing = exchanged[sample.record.id], Answer("", None, True)
        assert Answered(other, nothing).reference == Answered(sample, nothing).reference
        assert other.record.messages[0].content[1].audio != sample.record.messages[0].content[1].audio


def test_lines_that_cannot_be_answered_are_refused_by_name_and_the_rest_goes_on(renderer):
    silent = AudioPart("two.wav")
    bad = {
        3: (TokenSample(Record("c3", (Message("system", (TextPart("one"),)),))), "has no turn to answer"),
        4: (replace(heard("two"), speech={}), "no speech tokens for its audio 'two.wav'"),
        5: (asked("c5", [TextPart("one"), silent], [TextPart("two")], task="taqta"), "needs its transcript in `text`"),
        6: (asked("c6", [silent], [AudioPart("one.wav")], task="asr"), "the last turn of assistant must hold text"),
    }
    good = {2: heard("one"), 7: taqta("one", TextPart("two")), 8: asked("c8", [silent])}
    lines = sorted((bad | {number: (sample, "") for number, sample in good.items()}).items())
    given = [(f"my.jsonl:{number}", sample) for number, (sample, _) in lines]
    found = EncodedConversations(Path("my.jsonl"), given, [Refusal("my.jsonl:1", "no JSON")])
    samples, refused = answerable(found, renderer, "chat", "text")
    assert samples == [good[number] for number in sorted(good)]
    assert [refusal.name for refusal in refused] == [f"my.jsonl:{number}" for number in (1, *bad)]
    for refusal, (sample, reason) in zip(refused[1:], bad.values(), strict=True):
        assert reason in refusal.reason and not refusal.reason.startswith(sample.record.id)
    # Of those that are left, every answer has its reference.
    assert [Answered(one, Answer("", None, True)).reference for one in samples[:2]] == ["one", "one\ntwo"]


def test_references_without_words_are_not_scored():
    silence, word = (asked("c1", [TextPart("one")], [TextPart(answer)]) for answer in ("...!", "two"))
    nothing = Answer("", None, True)
    assert score([Answered(silence, nothing)]) == {}
    scores = score([Answered(silence, nothing), Answered(word, Answer("two", None, True))])["tqta"]
    assert (scores.num, scores.exact, scores.wer) == (1, 100, 0)


def test_written_answers_are_drawn_where_that_is_asked_for():
    class Recorder:
        def __init__(self) -> None:
            self.temperatures: list[float] = []

        def answer(self, samples, config, template, history, seeds):
            self.temperatures.append(config.temperature)
            return [Answer("one", None, True) for _ in samples]

    model = Recorder()
    answer_all(model, [heard("one"), spoken("two")], SamplingConfig(16, 0.7), "tts", "text", written_temperature=1.0)
    assert model.temperatures == [1.0, 0.7]
