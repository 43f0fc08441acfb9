"""Released prompts, and the records that they open. A record without an answer is what a model is served with.

The prompts are those of Step-Audio's tts.py, stepaudio.py and app.py, and of Step-Audio-EditX's config/prompts.py and
tts.py (formats.md 2.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepaudio_train.config.sft import ChatTask
from stepaudio_train.data.records import AudioPart, Message, Part, Record, Role, TextPart
from stepaudio_train.data.tags import AskedTag

ASR_PROMPT = "请记录下你所听到的语音内容。"
QUESTION_PROMPT = "请回答音频中的问题。"
CHAT_PROMPT = "适配用户的语言，用简短口语化的文字回答"
RAP_PROMPT = "请参考对话历史里的音色，用RAP方式将文本内容大声说唱出来。"
SINGING_PROMPT = "请参考对话历史里的音色，用哼唱的方式将文本内容大声唱出来。"
_VOICE_PROMPT = """作为一名卓越的声优演员，你的任务是根据文本中（）或()括号内标注的情感、语种或方言、音乐哼唱、语音调整\
等标签，以丰富细腻的情感和自然顺畅的语调来朗读文本。
# 情感标签涵盖了多种情绪状态，包括但不限于：
- "高兴1"
- "高兴2"
- "生气1"
- "生气2"
- "悲伤1"
- "撒娇1"

# 语种或方言标签包含多种语言或方言，包括但不限于：
- "中文"
- "英文"
- "韩语"
- "日语"
- "四川话"
- "粤语"
- "广东话"

# 音乐哼唱标签包含多种类型歌曲哼唱，包括但不限于：
- "RAP"
- "哼唱"

# 语音调整标签，包括但不限于：
- "慢速1"
- "慢速2"
- "快速1"
- "快速2"

请在朗读时，{speaker}根据这些情感标签的指示，调整你的情感、语气、语调和哼唱节奏，以确保文本的情感和意义得到准确而生动的传达，\
如果没有()或（）括号，则根据文本语义内容自由演绎。"""
EDIT_PROMPT = """As a highly skilled audio editing and tuning specialist, you excel in interpreting user instructions \
and applying precise adjustments to meet their needs. Your expertise spans a wide range of enhancement capabilities, \
including but not limited to:
# Emotional Enhancement
# Speaking Style Transfer
# Non-linguistic Adjustments
# Audio Tuning & Editing
Note: You will receive instructions in natural language and are expected to accurately interpret and execute the most \
suitable audio edits and enhancements.
"""

EditKind = Literal["emotion", "style", "speed"]


@dataclass(frozen=True)
class Voice:
    """Whose voice is to speak."""

    text: str
    """What the prompt recording says, with the tags that it was spoken with."""
    audio: AudioPart
    name: str | None = None
    """A speaker the model was trained on; None to clone the one of the prompt recording."""


def voice_prompt(speaker: str | None = None) -> str:
    """The voice actor's system prompt, for a named speaker or for the one of the prompt recording."""
    return _VOICE_PROMPT.format(speaker="" if speaker is None else f"使用[{speaker}]的声音，")


def synthesis_record(
    id: str, text: str, voice: Voice, asked: tuple[AskedTag, ...] = (), answer: AudioPart | None = None
) -> Record:
    """Text to speech in two rounds, the first of which is the prompt recording (paper 5.1).

    Args:
        text: as spoken, its tags before it (`tags.tagged`).
        asked: the tags in `text`; RAP and singing have system prompts of their own, as released.
    """
    styles = {one.tag.english for one in asked}
    system = voice_prompt(voice.name)
    if "RAP" in styles:
        system = RAP_PROMPT
    elif "singing" in styles:
        system = SINGING_PROMPT
    turns = [_turn("system", system), _turn("human", voice.text), _turn("assistant", voice.audio), _turn("human", text)]
    return _record(id, "tts", turns, answer)


def recognition_record(id: str, audio: AudioPart, answer: str | None = None) -> Record:
    """Speech to text, as the released chat model is asked for it."""
    return _record(id, "asr", [_turn("system", ASR_PROMPT), _turn("human", audio)], answer)


def question_record(id: str, audio: AudioPart, answer: str | None = None) -> Record:
    """A spoken question with a written answer."""
    return _record(id, "aqta", [_turn("system", QUESTION_PROMPT), _turn("human", audio)], answer)


def edit_record(id: str, instruction: str, audio: AudioPart, answer: AudioPart | None = None) -> Record:
    """A recording to be said otherwise.

    Args:
        instruction: such as `edit_instruction` gives.
    """
    # Released, this turn is encoded by itself, so that its first word gets a word mark: the blank gives the same ids.
    turns = [_turn("system", EDIT_PROMPT), _turn("human", f" {instruction}\n", audio, "\n")]
    return _record(id, "edit", turns, answer)


def edit_instruction(kind: EditKind, change: str, text: str) -> str:
    """The released wording of what is to change in a recording.

    Args:
        change: such as `happy`, `whisper` or `faster`; `remove` takes emotion or style away.
        text: what the recording says.
    """
    text = text.strip()
    if change == "remove" and kind in ("emotion", "style"):
        removed = "emotion" if kind == "emotion" else "speaking styles"
        return f"Remove any {removed} in the following audio and the reference text is: {text}\n"
    style = " style" if kind == "style" else ""
    return f"Make the following audio more {change}{style}. The text corresponding to the audio is: {text}\n"


def clone_record(id: str, text: str, voice: Voice, answer: AudioPart | None = None) -> Record:
    """Text to speech in the voice of a recording that the system prompt holds, as EditX has it.

    Raises:
        ValueError: the voice has no name, which this prompt needs.
    """
    if voice.name is None:
        raise ValueError("the prompt of EditX's clone names a speaker; give Voice.name")
    opening = (
        "Generate audio with the following timbre, prosody and speaking style\n\n[speaker_start]\n"
        f"speaker name: {voice.name}\nspeaker prompt text: \n{voice.text}\nspeaker audio tokens: \n"
    )
    return _record(
        id, "tts", [_turn("system", opening, voice.audio, "\n[speaker_end]\n"), _turn("human", text)], answer
    )


def _record(id: str, task: ChatTask, turns: list[Message], answer: str | AudioPart | None) -> Record:
    return Record(id, (*turns, *([] if answer is None else [_turn("assistant", answer)])), task=task)


def _turn(role: Role, *parts: str | Part) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))
