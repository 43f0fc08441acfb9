"""Instruction tags as the paper and the released prompts have them; released prompts to the id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepaudio_train.data.prompts import (
    CHAT_PROMPT,
    EDIT_PROMPT,
    Voice,
    clone_record,
    edit_instruction,
    edit_record,
    question_record,
    recognition_record,
    synthesis_record,
)
from stepaudio_train.data.records import AudioPart, Message, Record, TextPart
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.tags import TAGS, AskedTag, TagError, TagVocabulary, tagged
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Special, Vocabulary

SHARED = Path(__file__).resolve().parents[4] / "shared"
RELEASED = SHARED / "released" / "tokenizer.model"
GOLDEN = SHARED / "reference" / "golden_tokenizer.json"
needs_released = pytest.mark.skipif(
    not (RELEASED.is_file() and GOLDEN.is_file()), reason="needs the released tokenizer and golden ids in ../shared"
)
GROUP = "<audio_0><audio_1><audio_1024><audio_1025><audio_1026>"
PROMPT_AUDIO = AudioPart(tokens=GROUP)
BY_NAME = {tag.english: tag for tag in TAGS}


@pytest.fixture(scope="module")
def released() -> Renderer:
    return Renderer(Vocabulary(65536), TextTokenizer.from_file(RELEASED))


def test_the_papers_tags_are_there():
    assert {tag.english for tag in TAGS if tag.kind == "comparative"} == {"happy", "angry", "sad", "fast", "slow"}
    asked = {"Japanese", "Korean", "Cantonese", "Sichuanese", "cute", "RAP", "singing"}
    assert asked < {tag.english for tag in TAGS if tag.kind != "comparative"}


@pytest.mark.parametrize("spelling", ["高兴1", "高兴2", "生气1", "生气2", "悲伤1", "撒娇1", "慢速1", "慢速2", "快速2"])
def test_released_spellings_with_levels(spelling):
    (asked,), text = TagVocabulary().parse(f"（{spelling}）你好")
    assert asked.spell("zh") == spelling and text == "你好"
    # The English spelling means the same.
    assert TagVocabulary().parse(f"({asked.spell('en')})hello") == ((asked,), "hello")


@pytest.mark.parametrize("spelling", ["中文", "英文", "韩语", "日语", "四川话", "粤语", "广东话", "RAP", "rap", "哼唱"])
def test_released_spellings_without_levels(spelling):
    (asked,), _ = TagVocabulary().parse(f"({spelling}) x")
    assert asked.level is None


def test_several_tags_in_one_group_or_in_several():
    happy, fast = AskedTag(BY_NAME["happy"], 2), AskedTag(BY_NAME["fast"], 1)
    tags = TagVocabulary()
    for text in ("(happy 2, fast 1)hi (there)", "（高兴2、快速1）hi (there)", "(HAPPY2)(fast 1) hi (there)"):
        assert tags.parse(text) == ((happy, fast), "hi (there)")
    assert tags.parse(tagged((happy, fast), "hi (there)", "zh")) == ((happy, fast), "hi (there)")
    assert tags.parse("no (tag) here") == ((), "no (tag) here")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(hapy 2)x", "did you mean 'happy'"),
        ("(whisper)x", r"data.own_tags=\[whisper\]"),
        ("(fast 6)x", "levels from 1 to 5"),
        ("(fast 0)x", "levels from 1 to 5"),
        ("(Japanese 2)x", "no levels"),
        ("(fast 1,)x", "is no tag"),
    ],
)
def test_unknown_tags_and_levels_are_refused(text, reason):
    with pytest.raises(TagError, match=reason):
        TagVocabulary().parse(text)


def test_own_tags():
    tags = TagVocabulary(["whisper", "breathy 1-5"])
    (whisper, breathy), _ = tags.parse("(whisper, breathy 3)x")
    assert (whisper.tag.english, breathy.level) == ("whisper", 3)
    with pytest.raises(TagError, match="no levels"):
        tags.parse("(whisper 2)x")
    with pytest.raises(TagError, match="is there already"):
        TagVocabulary(["Happy"])


@needs_released
@pytest.mark.parametrize(("template", "add_bos"), [("tts", False), ("tts_bos", True)])
@pytest.mark.parametrize(
    ("name", "speaker", "prompt_text", "text", "asked"),
    [
        ("with_spk", "Tingting", "那等我们到海洋馆之后。", "你好，世界。", ()),
        ("clone", None, "那等我们到海洋馆之后。", "你好，世界。", ()),
        ("rap", "Tingting", "（RAP）远远甩开", "（RAP）我踏上自由的征途", ("RAP",)),
        ("vocal", "Tingting", "（哼唱）屋顶", "（哼唱）你从一座", ("singing",)),
    ],
)
def test_synthesis_prompts_are_the_released_ids(released, name, speaker, prompt_text, text, asked, template, add_bos):
    record = synthesis_record(
        "r", text, Voice(prompt_text, PROMPT_AUDIO, speaker), tuple(AskedTag(BY_NAME[tag]) for tag in asked)
    )
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[f"transformers4.48.3_add_bos_{add_bos}"]
    assert set(golden) == {"with_spk", "clone", "rap", "vocal"}
    assert released.render_chat_prompt(TokenSample(record), template).tolist() == golden[name]


@needs_released
def test_the_chat_prompt_is_the_released_ids(released):
    messages = (Message("system", (TextPart(CHAT_PROMPT),)), Message("human", (PROMPT_AUDIO,)))
    ids = released.render_chat_prompt(TokenSample(Record("r", messages)), "chat")
    assert ids.tolist() == json.loads(GOLDEN.read_text(encoding="utf-8"))["chat_ids_stepaudio_py"]


@needs_released
def test_edit_prompts_are_what_editx_encodes(released):
    """Its tts.py encodes the system turn, the role and the human turn apart, each with a word mark before it."""
    encode = released.text_tokenizer.encode
    instruction = edit_instruction("emotion", "happy", " hello there ")
    assert instruction == "Make the following audio more happy. The text corresponding to the audio is: hello there\n"
    bot, eot = int(Special.BOT), int(Special.EOT)
    expected = [int(Special.BOS), bot, *encode(f"system\n{EDIT_PROMPT}"), eot, bot, *encode("human\n")]
    expected += [*encode(f"{instruction}\n{GROUP}\n"), eot, bot, *encode("assistant\n")]
    record = edit_record("r", instruction, PROMPT_AUDIO)
    assert released.render_chat_prompt(TokenSample(record), "tts").tolist() == expected


@needs_released
def test_editx_clone_prompt(released):
    encode = released.text_tokenizer.encode
    system = (
        "Generate audio with the following timbre, prosody and speaking style\n\n[speaker_start]\n"
        f"speaker name: Ann\nspeaker prompt text: \nhello\nspeaker audio tokens: \n{GROUP}\n[speaker_end]\n"
    )
    bot, eot = int(Special.BOT), int(Special.EOT)
    text = encode("\nnew words")[len(encode("\n")) :]
    expected = [int(Special.BOS), bot, *encode(f"system\n{system}"), eot, bot, *encode("human\n"), *text, eot]
    expected += [bot, *encode("assistant\n")]
    record = clone_record("r", "new words", Voice("hello", PROMPT_AUDIO, "Ann"))
    assert released.render_chat_prompt(TokenSample(record), "tts").tolist() == expected
    with pytest.raises(ValueError, match=r"Voice\.name"):
        clone_record("r", "new words", Voice("hello", PROMPT_AUDIO))


@needs_released
@pytest.mark.parametrize("template", ["tts", "tts_bos", "chat"])
def test_served_prompts_begin_what_is_trained_on_for_every_released_form(released, template):
    voice = Voice("hello", PROMPT_AUDIO, "Ann")
    answer = AudioPart(tokens=GROUP * 2)
    pairs = [
        (recognition_record("r", PROMPT_AUDIO), recognition_record("r", PROMPT_AUDIO, "hello")),
        (question_record("r", PROMPT_AUDIO), question_record("r", PROMPT_AUDIO, "two")),
        (edit_record("r", "x", PROMPT_AUDIO), edit_record("r", "x", PROMPT_AUDIO, answer)),
        (synthesis_record("r", "hi", voice), synthesis_record("r", "hi", voice, answer=answer)),
        (clone_record("r", "hi", voice), clone_record("r", "hi", voice, answer)),
    ]
    for served, trained in pairs:
        prompt = released.render_chat_prompt(TokenSample(served), template).tolist()
        document = released.render_chat(TokenSample(trained), template)
        assert document.ids[: len(prompt)].tolist() == prompt
        assert document.loss_weights.tolist() == [0] * len(prompt) + [1] * (len(document.ids) - len(prompt))
