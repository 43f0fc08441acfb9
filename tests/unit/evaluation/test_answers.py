"""Answers are scored by task, and the control exchanges what is heard, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stepaudio_train.data.prompts import question_record, recognition_record
from stepaudio_train.data.records import AudioPart, Message, Record, TextPart
from stepaudio_train.data.render import TokenSample
from stepaudio_train.evaluation.answers import Answered, answer_all, score, spoken_line, with_exchanged_audio
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import Answer
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.vocabulary import Vocabulary

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
