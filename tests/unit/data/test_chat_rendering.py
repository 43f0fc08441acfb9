"""Conversations as ids: the released prompts exactly, prompts that begin what is trained on, loss on answers alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepaudio_train.data.batch import TASKS
from stepaudio_train.data.prompts import ASR_PROMPT
from stepaudio_train.data.records import AudioPart, Message, Part, Record, Role, TextPart, ToolCall
from stepaudio_train.data.render import Renderer, RenderError, TokenSample
from stepaudio_train.tokenizers.dual import audio_ids_to_text, merge_streams
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Special, Vocabulary

SHARED = Path(__file__).resolve().parents[4] / "shared"
RELEASED = SHARED / "released" / "tokenizer.model"
GOLDEN = SHARED / "reference" / "golden_tokenizer.json"
needs_released = pytest.mark.skipif(
    not (RELEASED.is_file() and GOLDEN.is_file()), reason="needs the released tokenizer and golden ids in ../shared"
)
GROUP = "<audio_0><audio_1><audio_1024><audio_1025><audio_1026>"
TEMPLATES = ("tts", "tts_bos", "chat")


def turn(role: Role, *parts: str | Part) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def sample(*messages: Message, **fields: Any) -> TokenSample:
    return TokenSample(Record("c1", messages, **fields))


DIALOGUE = sample(
    turn("system", "be brief"),
    turn("human", "what is this? ", AudioPart(tokens=GROUP)),
    turn("assistant", "one"),
    turn("human", "say two"),
    turn("assistant", AudioPart(tokens=GROUP * 2)),
    task="tts",
)


@pytest.fixture(scope="module")
def released() -> Renderer:
    return Renderer(Vocabulary(65536), TextTokenizer.from_file(RELEASED))


@needs_released
def test_released_chat_prompt(released):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    asked = sample(turn("system", "适配用户的语言，用简短口语化的文字回答"), turn("human", AudioPart(tokens=GROUP)))
    assert released.render_chat_prompt(asked, "chat").tolist() == golden["chat_ids_stepaudio_py"]


def as_turn(ids: list[int], tokenizer: TextTokenizer, vocabulary: Vocabulary) -> Message:
    """Undo the rendering of a turn: role, line's end, and text or audio."""
    role, _, text = tokenizer.decode(ids).partition("\n")
    audio = [index for index in ids if index >= vocabulary.linguistic_offset]
    part = AudioPart(tokens=audio_ids_to_text(audio, vocabulary)) if audio else TextPart(text)
    assert role.strip() in ("system", "human", "assistant")
    return turn(role.strip(), part)


@needs_released
@pytest.mark.parametrize("prompt", ["with_spk", "clone", "rap", "vocal"])
def test_released_synthesis_prompts(released, prompt):
    ids = json.loads(GOLDEN.read_text(encoding="utf-8"))["transformers4.48.3_add_bos_False"][prompt]
    starts = [place for place, index in enumerate(ids) if index == Special.BOT]
    ends = [place for place, index in enumerate(ids) if index == Special.EOT]
    turns = [
        as_turn(ids[start + 1 : end], released.text_tokenizer, released.vocabulary)
        for start, end in zip(starts[:-1], ends, strict=True)
    ]
    assert [t.role for t in turns] == ["system", "human", "assistant", "human"]
    assert released.render_chat_prompt(sample(*turns), "tts").tolist() == ids


@needs_released
@pytest.mark.parametrize(("template", "between"), [("tts", " "), ("tts_bos", "<s> "), ("chat", "")])
def test_turns_are_the_one_string_that_released_programs_encode(released, template, between):
    document = released.render_chat(DIALOGUE, template)
    text = (
        f"<|BOT|>{between}system\nbe brief<|EOT|><|BOT|>{between}human\nwhat is this? {GROUP}<|EOT|>"
        f"<|BOT|>{between}assistant\none<|EOT|><|BOT|>{between}human\nsay two<|EOT|>"
        f"<|BOT|>{between}assistant\n{GROUP}{GROUP}<|EOT|>"
    )
    assert document.ids.tolist() == released.text_tokenizer.encode(text, add_bos=True)
    apart = sample(turn("human", "say ", "two"), turn("assistant", "two"))
    joined = sample(turn("human", "say two"), turn("assistant", "two"))
    assert released.render_chat(apart, "tts").ids.tolist() == released.render_chat(joined, "tts").ids.tolist()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("loss", ["last", "all"])
def test_a_served_prompt_begins_what_was_trained_on(renderer, template, loss):
    document = renderer.render_chat(DIALOGUE, template, loss)
    prompt = renderer.render_chat_prompt(DIALOGUE, template)
    assert document.ids[: len(prompt)].tolist() == prompt.tolist()
    # Everything behind the prompt, and with it the end of the turn, is what the model has to say.
    assert (document.loss_weights[len(prompt) :] == 1).all() and document.ids[-1] == Special.EOT
    unanswered = sample(*DIALOGUE.record.messages[:-1], task="tts")
    assert renderer.render_chat_prompt(unanswered, template).tolist() == prompt.tolist()


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_alone_teach(renderer, template):
    last = renderer.render_chat(DIALOGUE, template, "last")
    every = renderer.render_chat(DIALOGUE, template, "all")
    assert last.ids.tolist() == every.ids.tolist() and last.task == TASKS.index("tts")
    vocabulary = renderer.vocabulary
    codes = merge_streams([0, 1, 0, 1], [0, 1, 2, 0, 1, 2], vocabulary).tolist()
    assert last.ids[last.loss_weights == 1].tolist() == [*codes, Special.EOT]
    line_end = renderer.text_tokenizer.encode("\n")
    one = renderer.text_tokenizer.encode("\none")[len(line_end) :]
    assert every.ids[every.loss_weights == 1].tolist() == [*one, Special.EOT, *codes, Special.EOT]


def test_codes_and_an_encoded_recording_are_the_same_ids(renderer):
    spoken = sample(turn("human", AudioPart("a.wav")), turn("assistant", "one"))
    spoken = replace(spoken, speech={"a.wav": SpeechTokens(np.array([0, 1]), np.array([0, 1, 2]))})
    written = sample(turn("human", AudioPart(tokens=GROUP)), turn("assistant", "one"))
    assert renderer.render_chat(spoken, "tts").ids.tolist() == renderer.render_chat(written, "tts").ids.tolist()


def test_results_of_tools_are_turns_without_loss(renderer):
    called = sample(turn("human", "one"), turn("assistant", "two"), turn("tool", "three"), turn("assistant", "four"))
    document = renderer.render_chat(called, "chat", "all")
    assert (document.ids[document.loss_weights == 1] == Special.EOT).sum() == 2
    result = sample(*called.record.messages[:-1])
    assert renderer.render_chat_prompt(result, "chat").tolist() == renderer.render_chat_prompt(called, "chat").tolist()


HUMAN, ANSWER = turn("human", "one"), turn("assistant", "two")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([HUMAN], "ends with a turn of human"),
        ([ANSWER], "turn 1 is assistant: at the beginning comes system or human"),
        ([HUMAN, turn("system", "x"), HUMAN, ANSWER], "turn 2 is system: after human comes assistant"),
        ([HUMAN, ANSWER, ANSWER], "turn 3 is assistant: after assistant comes human or tool"),
        ([HUMAN, turn("assistant", "")], r"turn 2 \(assistant\) is empty"),
        ([HUMAN, turn("assistant", "two<|EOT|>")], r"has <\|EOT\|> in its text"),
        ([turn("human", AudioPart("a.wav")), ANSWER], "no speech tokens for its audio 'a.wav'"),
        ([turn("human", AudioPart(tokens="<audio_0><audio_1>")), ANSWER], "2 audio tokens are no whole number"),
        ([turn("human", AudioPart(tokens="<audio_1024>" * 5)), ANSWER], "should be linguistic"),
        ([turn("human", AudioPart(tokens="<audio_9000>")), ANSWER], "the last one is <audio_5119>"),
    ],
)
def test_what_cannot_be_rendered_says_why(renderer, messages, reason):
    with pytest.raises(RenderError, match=f"^c1: .*{reason}"):
        renderer.render_chat(sample(*messages), "tts")


def test_nothing_to_answer(renderer):
    for messages in ([turn("system", "be brief")], [ANSWER]):
        with pytest.raises(RenderError, match="no turn to answer"):
            renderer.render_chat_prompt(sample(*messages), "tts")


HEARD = AudioPart(tokens=GROUP, text="what is seven plus two")


def decoded(renderer: Renderer, conversation: TokenSample, **options: Any) -> str:
    """What is rendered, with every five audio tokens as A."""
    ids = renderer.render_chat(conversation, "chat", **options).ids.tolist()
    audio = [index >= renderer.vocabulary.linguistic_offset for index in ids]
    text = renderer.text_tokenizer.decode([int(Special.UNK) if a else i for i, a in zip(ids, audio, strict=True)])
    return text.replace("<unk>" * 5, "A")


@pytest.mark.parametrize(
    ("messages", "fields", "task"),
    [
        ([turn("human", "one"), turn("assistant", "two")], {}, "tqta"),
        ([turn("human", HEARD), turn("assistant", "two")], {}, "aqta"),
        ([turn("human", HEARD), turn("assistant", HEARD)], {}, "aqaa"),
        ([turn("human", "one"), turn("assistant", HEARD)], {}, "tts"),
        ([turn("system", ASR_PROMPT), turn("human", HEARD), turn("assistant", "two")], {}, "asr"),
        ([turn("human", "one"), turn("assistant", ToolCall("f"))], {}, "tool"),
        ([turn("human", "one"), turn("assistant", "two")], {"tools": ({"name": "f"},)}, "tool"),
        ([turn("system", "x"), turn("human", "one"), turn("assistant", "two")], {"task": "role_play"}, "role_play"),
    ],
)
def test_a_conversation_has_a_task_for_its_loss(renderer, messages, fields, task):
    document = renderer.render_chat(sample(*messages, **fields), "tts")
    assert TASKS[document.task] == task


def test_earlier_recordings_of_a_dialogue_go_in_as_text(renderer):
    dialogue = sample(turn("human", HEARD), turn("assistant", "nine"), turn("human", HEARD), turn("assistant", "nine"))
    frame = "<s><|BOT|>human\n{}<|EOT|><|BOT|>assistant\nnine<|EOT|><|BOT|>human\nA<|EOT|><|BOT|>assistant\nnine<|EOT|>"
    assert decoded(renderer, dialogue) == frame.format("what is seven plus two")
    assert decoded(renderer, dialogue, history="audio") == frame.format("A")
    for history in ("text", "audio"):
        prompt = renderer.render_chat_prompt(dialogue, "chat", history).tolist()
        assert renderer.render_chat(dialogue, "chat", history=history).ids[: len(prompt)].tolist() == prompt
    unwritten = sample(turn("human", AudioPart(tokens=GROUP)), *dialogue.record.messages[1:])
    with pytest.raises(RenderError, match=r"turn 1: its audio needs its transcript.*data\.history=audio"):
        renderer.render_chat(unwritten, "chat")


def test_a_voice_to_speak_in_stays_audio(renderer):
    rounds = [turn("human", "one"), turn("assistant", HEARD), turn("human", "two"), turn("assistant", HEARD)]
    assert decoded(renderer, sample(*rounds)).count("A") == 2


def test_taqta_answers_with_what_it_heard_first(renderer):
    asked = [turn("human", "answer this: ", HEARD)]
    told = decoded(renderer, sample(*asked, turn("assistant", "nine"), task="taqta"))
    expected = "<s><|BOT|>human\nanswer this: A<|EOT|><|BOT|>assistant\nwhat is seven plus two\nnine<|EOT|>"
    assert told == expected
    written = turn("assistant", "what is seven plus two\nnine")
    assert decoded(renderer, sample(*asked, written, task="taqta")) == expected
    document = renderer.render_chat(sample(*asked, written, task="taqta"), "chat")
    prompt = renderer.render_chat_prompt(sample(*asked, task="taqta"), "chat")
    # The written question goes in without loss, the recording's text comes out with it (paper 5.2).
    assert document.loss_weights.tolist() == [0] * len(prompt) + [1] * (len(document) - len(prompt))


def test_tools_their_calls_and_their_results(renderer):
    schema = {"name": "add", "parameters": {"type": "object"}}
    call = turn("assistant", "wait ", ToolCall("add", {"a": 7, "b": 2}))
    turns = [turn("system", "be brief"), turn("human", HEARD), call, turn("tool", "9"), turn("assistant", "nine")]
    assert decoded(renderer, sample(*turns, tools=(schema,))) == (
        '<s><|BOT|>system\nbe brief<|EOT|><|BOT|>tool_json_schemas\n[{"name": "add", "parameters": {"type": "object"}}]'
        '<|EOT|><|BOT|>human\nA<|EOT|><|BOT|>assistant\nwait <|CALL_START|> function\nadd\n{"a": 7, "b": 2}<|CALL_END|>'
        "<|EOT|><|BOT|>tool\n9<|EOT|><|BOT|>assistant\nnine<|EOT|>"
    )


@pytest.mark.parametrize(
    ("task", "messages", "reason"),
    [
        ("asr", [turn("human", "one"), turn("assistant", "two")], "the last turn of human must hold audio"),
        ("asr", [turn("human", HEARD), turn("assistant", HEARD)], "the last turn of assistant must hold text"),
        ("tqta", [turn("human", HEARD), turn("assistant", "two")], "the last turn of human must hold text"),
        ("edit", [turn("human", HEARD), turn("assistant", HEARD)], "must hold text and audio"),
        ("taqta", [turn("human", "x", AudioPart(tokens=GROUP)), turn("assistant", "two")], "needs its transcript"),
        ("role_play", [turn("human", "one"), turn("assistant", "two")], "the first turn must be the system's"),
    ],
)
def test_a_conversation_is_what_its_task_says(renderer, task, messages, reason):
    with pytest.raises(RenderError, match=reason):
        renderer.render_chat(sample(*messages, task=task), "tts")
