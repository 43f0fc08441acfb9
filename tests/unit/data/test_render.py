"""The one renderer: exact ids of every pretraining format, prompts that begin what is trained on, loss on targets."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from stepaudio_train.data.batch import TASKS
from stepaudio_train.data.records import AudioPart, Span, speech_record, text_record
from stepaudio_train.data.render import RenderError, TokenSample
from stepaudio_train.testing.token_data import make_speech
from stepaudio_train.tokenizers.dual import merge_streams
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.vocabulary import Special

BOS, EOS = Special.BOS, Special.EOS
PRETRAINING = ("text", "continuation", "interleaved", "asr", "tts")


def speech(num_groups: int, spans: tuple[Span, ...] = (), name: str = "r", text: str | None = "one two") -> TokenSample:
    codes = SpeechTokens(np.arange(2 * num_groups + 1), np.arange(3 * num_groups + 2))
    return TokenSample(speech_record(name, AudioPart("0", text=text, spans=spans)), {"0": codes})


def test_exact_ids(renderer):
    sample = speech(2)
    v = renderer.vocabulary
    lin, sem = v.linguistic_offset, v.semantic_offset
    audio = [lin, lin + 1, sem, sem + 1, sem + 2, lin + 2, lin + 3, sem + 3, sem + 4, sem + 5]
    text = renderer.text_tokenizer.encode("one two")
    a, t = [31, *audio, 32], [33, *text, 34]
    assert renderer.render(sample, "continuation").ids.tolist() == [BOS, *a, EOS]
    assert renderer.render(sample, "asr").ids.tolist() == [BOS, Special.ASR, *a, *t, EOS]
    assert renderer.render(sample, "tts").ids.tolist() == [BOS, Special.TTS, *t, *a, EOS]
    assert renderer.render(sample, "text").ids.tolist() == [BOS, *text, EOS]
    assert renderer.render(TokenSample(text_record("t", "one two")), "text").ids.tolist() == [BOS, *text, EOS]


def test_other_layouts_hold_one_stream_or_both_in_a_row(renderer):
    sample = speech(2, spans=(Span("one", 0.0, 0.12), Span("two", 0.12, 0.24)))
    v = renderer.vocabulary
    linguistic = [v.linguistic_offset + code for code in range(4)]
    semantic = [v.semantic_offset + code for code in range(6)]
    for layout, audio in (("linguistic", linguistic), ("semantic", semantic), ("sequential", linguistic + semantic)):
        other = replace(renderer, speech_layout=layout)
        assert other.render(sample, "continuation").ids.tolist() == [BOS, 31, *audio, 32, EOS]
        with pytest.raises(RenderError, match=f"r: .*not {layout}"):
            other.render(sample, "interleaved")


def test_prompt_is_the_beginning_of_what_is_trained_on(renderer):
    random = np.random.default_rng(0)
    for i in range(20):
        sample = make_speech(random, f"p{i}", mean_words=5)
        for task in PRETRAINING:
            if task == "interleaved" and len(sample.record.audio_parts()[0].spans) < 2:
                continue
            ids = renderer.render(sample, task).ids
            prompt = renderer.render_prompt(sample, task)
            assert len(prompt) < len(ids)
            assert np.array_equal(ids[: len(prompt)], prompt), task


def test_prompts_need_nothing_of_the_target(renderer):
    untranscribed = speech(3, text=None)
    assert renderer.render_prompt(untranscribed, "asr")[-1] == Special.TEXT_START
    silent = replace(speech(3), speech={})
    assert renderer.render_prompt(silent, "tts")[-1] == Special.AUDIO_START
    with pytest.raises(RenderError, match="r: has no text"):
        renderer.render(untranscribed, "asr")
    with pytest.raises(RenderError, match="r: has no speech tokens"):
        renderer.render(silent, "tts")


@pytest.mark.parametrize("task", ["asr", "tts"])
def test_loss_on_the_target_alone(renderer, task):
    sample = speech(4)
    document = renderer.render(sample, task, "target")
    prompt = len(renderer.render_prompt(sample, task))
    assert document.task == TASKS.index(task)
    assert not document.loss_weights[:prompt].any() and document.loss_weights[prompt:].all()
    assert renderer.render(sample, task, "all").loss_weights.all()


@pytest.mark.parametrize("task", ["text", "continuation"])
def test_tasks_without_input_always_teach_everything(renderer, task):
    assert renderer.render(speech(4), task, "target").loss_weights.all()


def test_interleaving_alternates_and_cuts_at_groups(renderer):
    words = ("one", "two", "three", "four")
    ends_s = (0.0, 0.3, 0.6, 1.0, 1.4)
    spans = tuple(Span(s, e, w) for (s, e), w in zip(pairwise(ends_s), words, strict=True))
    starts = set()
    for name in ("a", "b", "c", "d", "e"):
        sample = speech(12, spans, name)
        ids = renderer.render(sample, "interleaved").ids.tolist()
        assert ids == renderer.render(sample, "interleaved").ids.tolist()
        marks = [i for i in ids if i in (Special.AUDIO_START, Special.TEXT_START)]
        assert len(marks) == 4 and all(x != y for x, y in pairwise(marks))
        starts.add(marks[0])
        codes = sample.speech["0"]
        audio = merge_streams(codes.linguistic, codes.semantic, renderer.vocabulary).tolist()
        edges = [0, 10, 25, 40, 60]  # 0.3 s is 2.5 groups and rounds to the even 2; 0.6 s is 5; 1.0 s 8.3; 1.4 s 11.7
        for s, mark in enumerate(marks):
            if mark == Special.AUDIO_START:
                expected = [31, *audio[edges[s] : edges[s + 1]], 32]
            else:
                expected = [33, *renderer.text_tokenizer.encode(words[s]), 34]
            assert any(ids[i : i + len(expected)] == expected for i in range(len(ids))), (name, s)
    assert len(starts) == 2, "which kind comes first should depend on the id"


def test_what_cannot_be_rendered_is_named(renderer):
    with pytest.raises(RenderError, match="r: interleaving needs"):
        renderer.render(speech(3), "interleaved")
    with pytest.raises(RenderError, match="r: its audio is shorter"):
        renderer.render(speech(0), "asr")
    with pytest.raises(RenderError, match="t: the task takes a recording"):
        renderer.render(TokenSample(text_record("t", "one")), "asr")
    with pytest.raises(RenderError, match="image"):
        renderer.render(speech(3), "image")
    wrong = TokenSample(speech(2).record, {"0": SpeechTokens(np.full(4, 1024), np.zeros(6, int))})
    with pytest.raises(RenderError, match="r: linguistic code 1024"):
        renderer.render(wrong, "asr")
