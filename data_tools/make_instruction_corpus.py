"""Make conversations of synthesised speech for fine-tuning, whose instruction tags are true, with espeak-ng.

    python -m data_tools.make_instruction_corpus OUT --scale 1 --seed 0

Writes OUT/{train,validation,test}.jsonl, conversations as docs/fine_tuning.md has them, and OUT/wav/*.wav. For
tokenizers and pretraining, which should have heard the like: OUT/texts.txt, every line that the training conversations
are written with, and OUT/manifest.jsonl, a share of their recordings with transcripts. For what learns from rewards:
OUT/{questions,held_out_questions}.jsonl, more spoken questions, which leave it open whether a word or a sentence
answers. In training one does as often as the other; in these files it is a sentence.

| task | what is taught |
|---|---|
| tts  | a named voice says a text as its tags ask for: speed, mood, language, RAP, singing |
| edit | a neutral recording, said otherwise (fast, slow, happy, sad, angry) |
| asr  | what a recording says |
| aqta | the written answer to a spoken question: the number after or before, sums, opposites |
| tqta | the same questions, written |

The files share no recording. Texts to be spoken with tags in the test split do not occur in the others; the questions
do, in other voices, at other speeds and pitches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from data_tools.make_corpus import (
    ENGLISH,
    MANDARIN,
    NOISY_ROOM,
    PITCH,
    PRONOUNCED,
    RATE_WPM,
    SPEAKERS,
    Espeak,
    Room,
    Utterance,
    draw_utterance,
    record,
    run_maker,
)
from stepaudio_train.data.prompts import EditKind, edit_instruction, question_record, recognition_record
from stepaudio_train.data.records import AudioPart, Message, Part, Record, Role, TextPart, record_to_json
from stepaudio_train.data.tags import LEVELS, TAGS, AskedTag, tagged

SPLIT_SHARES = {"train": 0.86, "validation": 0.04, "test": 0.10}
VOICES = {"Adam": "m1", "Ben": "m3", "Clara": "f1"}
"""Name -> espeak variant. Each speaks every language."""
LANGUAGE_NAMES = {"en": "English", "zh": "Chinese"}
LANGUAGES = {"English": "en-us", "Chinese": "cmn-latn-pinyin", "Cantonese": "yue-latn-jyutping", "Japanese": "ja"}
DIGITS = {
    "English": ENGLISH[:10],
    "Chinese": tuple(MANDARIN)[:10],
    "Cantonese": ("ling4", "jat1", "ji6", "saam1", "sei3", "ng5", "luk6", "cat1", "baat3", "gau2"),
    "Japanese": ("れい", "いち", "に", "さん", "よん", "ご", "ろく", "なな", "はち", "きゅう"),
}
NEUTRAL_RATE_WPM, NEUTRAL_PITCH, NEUTRAL_RANGE = 140, 50, 50
FASTER, SLOWER = 1.16, 1.12
"""Of the speaking rate, a level."""
MELODIES = {"English": (20, 50, 80, 50, 20, 50), "Chinese": (80, 50, 20, 50, 80, 50)}
"""Pitch of each sung word, of espeak's 0-99: one tune rises first, the other falls."""
CHANTED_WORDS = 4
"""Of songs and RAP: a tune and a rhythm need some length. Other texts with tags are of one word or two."""
SUNG_RATE_WPM, RAP_RATE_WPM = 100, 220
BEAT_S = 0.36
STUDIO = Room(pause_s=(0.04, 0.06), noise_db=(-72.0, -70.0), peak=(0.6, 0.6))
"""Where what is to be imitated is recorded: of a noise there is nothing to learn."""
NUMBERS = {"en": ENGLISH[:10], "zh": tuple(MANDARIN)[:10]}
CHANGES: dict[str, tuple[EditKind, str]] = {
    "fast": ("speed", "faster"),
    "slow": ("speed", "slower"),
    **{mood: ("emotion", mood) for mood in ("happy", "sad", "angry")},
}
"""Tag -> what an edit is asked for, in the released words."""
HEARD_BEFORE = 3
"""One in so many recordings goes into the manifest."""
OPPOSITES = (("left", "right"), ("up", "down"), ("on", "off"), ("go", "stop"))
KIND_SHARES = {"speed": 0.56, "mood": 0.18, "language": 0.12, "RAP": 0.04, "singing": 0.05, "none": 0.05}
"""Of what is spoken with tags. Speed has the finest levels."""
PRONOUNCED |= {
    "加": "jia1",
    "等": "deng3",
    "于": "yu2",
    "几": "ji3",
    "后": "hou4",
    "前": "qian2",
    "面": "mian4",
    "是": "shi4",
}


NUM_TTS, NUM_EDIT, NUM_ASR, NUM_AQTA = 5000, 600, 2200, 1600
"""Conversations of each kind at scale 1, over all splits."""
NUM_OPEN = 800
"""Spoken questions of the training split at scale 1 that are answered in a word or in a sentence, by chance."""
QUESTION_FILES = {"questions": 1200, "held_out_questions": 400}
"""More of these at scale 1, in no split, answered in a sentence."""
OPEN_PROMPT = "Answer in a word or in a sentence."
SENTENCES = {"en": "it is {}", "zh": "是{}"}


Line = tuple[str, str, str, AskedTag | None]
"""Text, language, voice and tag of something to be spoken."""


def delivery(asked: AskedTag | None) -> tuple[int, int, int]:
    """(rate in words a minute, pitch, pitch range) that make a tag true."""
    rate, pitch, spread = float(NEUTRAL_RATE_WPM), NEUTRAL_PITCH, NEUTRAL_RANGE
    level = 0 if asked is None else asked.level or 0
    name = "" if asked is None else asked.tag.english
    if name == "fast":
        rate *= FASTER**level
    elif name == "slow":
        rate /= SLOWER**level
    elif name == "happy":
        rate, pitch, spread = rate * 1.03**level, pitch + 7 * level, spread + 9 * level
    elif name == "sad":
        rate, pitch, spread = rate / 1.04**level, pitch - 7 * level, spread - 9 * level
    elif name == "angry":
        rate, pitch, spread = rate * 1.06**level, pitch - 4 * level, spread + 9 * level
    return round(rate), pitch, spread


def questions() -> list[tuple[str, str, str]]:
    """(language, question, answer) of every fact."""
    found = []
    for language, names in NUMBERS.items():
        for value, name in enumerate(names):
            if value < 9:
                after = f"what comes after {name}" if language == "en" else f"{name}后面是几"
                found.append((language, after, names[value + 1]))
            if value > 0:
                before = f"what comes before {name}" if language == "en" else f"{name}前面是几"
                found.append((language, before, names[value - 1]))
            for other in range(10 - value):
                plus = f"{name} plus {names[other]}" if language == "en" else f"{name}加{names[other]}等于几"
                found.append((language, plus, names[value + other]))
    for one, other in OPPOSITES:
        found += [("en", f"opposite of {a}", b) for a, b in ((one, other), (other, one))]
    return found


class Studio:
    """Speaks, records and writes; no two recordings are alike."""

    def __init__(self, directory: Path, rng: np.random.Generator) -> None:
        self._espeak, self._directory, self._rng = Espeak(), directory, rng
        self._number = 0

    def plain(self, utterance: Utterance) -> AudioPart:
        """A recording with pauses and noise as in `make_corpus`."""
        speech, _ = self._espeak.synthesise(utterance)
        return self._write(speech, utterance, LANGUAGE_NAMES[utterance.language], NOISY_ROOM)

    def styled(self, text: str, name: str, language: str, asked: AskedTag | None) -> AudioPart:
        """A voice's recording of a text, spoken as a tag asks for."""
        code = "zh" if language == "Chinese" else "en"  # how the text is divided into words
        spoken = Utterance(text, code, f"{LANGUAGES[language]}+{VOICES[name]}", *delivery(asked))
        style = "" if asked is None else asked.tag.english
        if style == "singing":
            notes = _notes(len(spoken.words), language)
            sung = [self._alone(spoken, w, SUNG_RATE_WPM, note) for w, note in zip(spoken.words, notes, strict=True)]
            speech = np.concatenate(sung)
        elif style == "RAP":
            speech = self._on_beats([self._alone(spoken, word, RAP_RATE_WPM, 35) for word in spoken.words])
        else:
            speech, _ = self._espeak.synthesise(spoken)
        return self._write(speech, spoken, language, STUDIO)

    def _alone(self, utterance: Utterance, word: str, rate_wpm: int, pitch: int) -> np.ndarray:
        """One word, monotone, without the silence around it."""
        speech, _ = self._espeak.synthesise(
            replace(utterance, text=word, rate_wpm=rate_wpm, pitch=pitch, pitch_range=0)
        )
        loud = np.flatnonzero(np.abs(speech) > 0.02 * np.abs(speech).max())
        return speech[loud[0] : loud[-1] + 1]

    def _on_beats(self, words: list[np.ndarray]) -> np.ndarray:
        beat = int(BEAT_S * self._espeak.sample_rate_hz)
        starts = np.cumsum([0, *(beat * -(-len(word) // beat) for word in words[:-1])])
        chant = np.zeros(int(starts[-1]) + len(words[-1]), np.float32)
        for start, word in zip(starts, words, strict=True):
            chant[start : start + len(word)] = word
        return chant

    def _write(self, speech: np.ndarray, said: Utterance, language: str, room: Room) -> AudioPart:
        rate = self._espeak.sample_rate_hz
        wave, _ = record(speech, rate, self._rng, room)
        name = f"wav/{self._number:06d}.wav"
        self._number += 1
        soundfile.write(self._directory / name, wave, rate, subtype="PCM_16")
        duration_s = round(wave.size / rate, 4)
        return AudioPart(name, text=said.text, language=language, speaker=said.speaker, duration_s=duration_s)


class ConversationMaker:
    """Draws conversations of every task."""

    def __init__(self, studio: Studio, rng: np.random.Generator) -> None:
        self._studio, self._rng = studio, rng
        self._facts = questions()
        self._said: set[Utterance] = set()

    def conversations(self, split: str, lines: Sequence[Line], share: float) -> Iterator[Record]:
        """Those of a split.

        Args:
            lines: what is spoken with tags.
            share: of the numbers of the other tasks.
        """
        for number, line in enumerate(tqdm(lines, f"{split}: speak", leave=False)):
            yield self._tts(f"{split}_tts_{number}", *line)
        changes = [line for line in lines if line[3] is not None and line[3].tag.english in CHANGES]
        for number in range(round(share * NUM_EDIT)):
            text, language, name, asked = changes[self._rng.integers(len(changes))]
            assert asked is not None
            yield self._edit(f"{split}_edit_{number}", text, language, name, asked)
        for number in tqdm(range(round(share * NUM_ASR)), f"{split}: say", leave=False):
            yield self._asr(f"{split}_asr_{number}")
        for number in tqdm(range(round(share * NUM_AQTA)), f"{split}: ask", leave=False):
            yield self._aqta(f"{split}_aqta_{number}")

    def open_questions(self, name: str, count: int, sentences: float) -> Iterator[Record]:
        """Spoken questions that a word may answer or a sentence, and a share of them answered in one."""
        for number in tqdm(range(count), f"{name}: ask", leave=False):
            record = self._aqta(f"{name}_{number}")
            asked = record.messages[-2]
            answer = "".join(part.text for part in record.messages[-1].content if isinstance(part, TextPart))
            if self._rng.random() < sentences:
                answer = in_a_sentence(answer)
            turns = (_turn("system", OPEN_PROMPT), asked, _turn("assistant", answer))
            yield replace(record, messages=turns)

    def tqta(self) -> Iterator[Record]:
        """Every question, written."""
        for number, (_, question, answer) in enumerate(self._facts):
            yield Record(f"tqta_{number}", (_turn("human", question), _turn("assistant", answer)), task="tqta")

    def _tts(self, id: str, text: str, language: str, name: str, asked: AskedTag | None) -> Record:
        """A named voice says a text."""
        said = _digits_spoken(text, language) if text[0].isdigit() else text
        answer = replace(self._studio.styled(said, name, language, asked), text=text)
        question = tagged([] if asked is None else [asked], text)
        turns = (_turn("system", voice_line(name)), _turn("human", question), _turn("assistant", answer))
        return Record(id, turns, _meta(text, language, name, asked), "tts")

    def _edit(self, id: str, text: str, language: str, name: str, asked: AskedTag) -> Record:
        """A neutral recording, said otherwise."""
        before = self._studio.styled(text, name, language, None)
        after = self._studio.styled(text, name, language, asked)
        instruction = edit_instruction(*CHANGES[asked.tag.english], text)
        human = _turn("human", f" {instruction}\n", before, "\n")
        return Record(id, (human, _turn("assistant", after)), _meta(text, language, name, asked), "edit")

    def _asr(self, id: str) -> Record:
        """A recording as the pretraining corpus has them, and what it says."""
        said = self._new(lambda: draw_utterance(self._rng))
        return recognition_record(id, self._studio.plain(said), said.text)

    def _aqta(self, id: str) -> Record:
        """A spoken question and its written answer."""
        language, question, answer = self._facts[self._rng.integers(len(self._facts))]
        speakers = [name for spoken, name in SPEAKERS if spoken == language]
        said = self._new(
            lambda: Utterance(
                question,
                language,
                _draw(self._rng, speakers),
                *(int(self._rng.integers(low, high + 1)) for low, high in (RATE_WPM, PITCH)),
            )
        )
        return question_record(id, self._studio.plain(said), answer)

    def _new(self, draw: Callable[[], Utterance]) -> Utterance:
        """An utterance that is not in the corpus yet."""
        while (utterance := draw()) in self._said:
            pass
        self._said.add(utterance)
        return utterance


def in_a_sentence(answer: str) -> str:
    """A word as a whole sentence of its language."""
    return SENTENCES["en" if answer.isascii() else "zh"].format(answer)


def voice_line(name: str) -> str:
    """The system turn that names a voice, in the words of the released prompt."""
    return f"使用[{name}]的声音"


def control_grid(rng: np.random.Generator) -> list[Line]:
    """What the test split speaks: every text of a kind with every tag of that kind, so that tags alone differ."""
    moods = [_asked(mood, level) for mood in ("happy", "sad", "angry") for level in LEVELS]
    speeds = [None, *(_asked(speed, level) for speed in ("fast", "slow") for level in LEVELS)]
    kinds: list[tuple[int, int, list[AskedTag | None]]] = [(16, 2, speeds), (8, 2, [None, *moods])]
    kinds += [(10, CHANTED_WORDS, [None, _asked(style)]) for style in ("singing", "RAP")]
    grid: list[Line] = []
    for num_texts, num_words, tags in kinds:
        for _ in range(num_texts):
            text, language = _draw_text(rng, num_words)
            name = _draw(rng, VOICES)
            grid += [(text, language, name, asked) for asked in tags]
    for _ in range(10):
        text, name = _draw_digits(rng), _draw(rng, VOICES)
        grid += [(text, language, name, _asked(language)) for language in LANGUAGES]
    return grid


def draw_line(rng: np.random.Generator, not_of: set[str]) -> Line:
    """Something to be spoken in training."""
    while True:
        kind = rng.choice(
            ["speed", "mood", "language", "RAP", "singing", "none"], p=[0.56, 0.18, 0.12, 0.04, 0.05, 0.05]
        )
        name, level = _draw(rng, VOICES), int(rng.choice(LEVELS))
        text, language = _draw_text(rng, CHANTED_WORDS if kind in ("RAP", "singing") else int(rng.choice((1, 2, 2))))
        asked = None
        if kind == "language":
            language, text = _draw(rng, LANGUAGES), _draw_digits(rng)
            asked = _asked(language)
        elif kind in ("RAP", "singing"):
            asked = _asked(str(kind))
        elif kind != "none":
            asked = _asked(_draw(rng, ("fast", "slow") if kind == "speed" else ("happy", "sad", "angry")), level)
        if text not in not_of:
            return text, language, name, asked


def make_instruction_corpus(directory: Path, scale: float, seed: int) -> dict[str, int]:
    """Write the conversations into `directory`, which must not exist; returns how many each split has.

    Args:
        scale: 1 makes about 9,000 conversations, three and a half hours of speech.
    """
    (directory / "wav").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    maker = ConversationMaker(Studio(directory, rng), rng)
    grid = control_grid(rng)
    held_out = {text for text, *_ in grid}
    splits: dict[str, list[Record]] = {}
    for split, share in SPLIT_SHARES.items():
        lines = grid if split == "test" else [draw_line(rng, held_out) for _ in range(round(share * scale * NUM_TTS))]
        splits[split] = list(maker.conversations(split, lines, share * scale))
    splits["train"] += maker.tqta()
    splits["train"] += maker.open_questions("train_open", round(scale * NUM_OPEN), 0.5)
    for split, records in splits.items():
        # The loss on the first held-out conversations is to be one of every task.
        rng.shuffle(records)  # type: ignore[arg-type]
        _write_records(records, directory / f"{split}.jsonl")
    for name, count in QUESTION_FILES.items():
        _write_records(maker.open_questions(name, round(scale * count), 1.0), directory / f"{name}.jsonl")
    _write_manifest(splits["train"], directory / "manifest.jsonl")
    texts = (
        part.text for one in splits["train"] for m in one.messages for part in m.content if isinstance(part, TextPart)
    )
    (directory / "texts.txt").write_text("".join(f"{text.strip()}\n" for text in texts), encoding="utf-8")
    return {split: len(records) for split, records in splits.items()}


def _write_records(records: Iterable[Record], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record_to_json(one), ensure_ascii=False) + "\n" for one in records)


def _write_manifest(records: Sequence[Record], path: Path) -> None:
    """Every HEARD_BEFORE-th recording of English and Mandarin words, as `stepaudio prepare` takes them."""
    heard = [
        replace(part, language="zh" if part.language == "Chinese" else "en")
        for record in records
        for part in record.audio_parts()
        if part.language in ("English", "Chinese") and not (part.text or "")[0].isdigit()
    ]
    with path.open("w", encoding="utf-8") as file:
        for part in heard[::HEARD_BEFORE]:
            line = {"audio": part.audio, "text": part.text, "language": part.language, "speaker": part.speaker}
            file.write(json.dumps({**line, "duration_s": part.duration_s}, ensure_ascii=False) + "\n")


def _turn(role: Role, *parts: str | Part) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def _meta(text: str, language: str, name: str, asked: AskedTag | None) -> dict[str, Any]:
    """What is true of an answer, for `stepaudio evaluate control`."""
    meta: dict[str, Any] = {"text": text, "language": language, "speaker": name, "tags": []}
    if asked is not None:
        meta["tags"] = [asked.spell("en")]
        if asked.tag.english == "singing":
            meta["notes"] = _notes(len(_words(text, language)), language)
    return meta


def _notes(num_words: int, language: str) -> list[int]:
    melody = MELODIES[language]
    return [melody[number % len(melody)] for number in range(num_words)]


def _words(text: str, language: str) -> list[str]:
    return text.split() if language != "Chinese" or " " in text else list(text)


def _digits_spoken(text: str, language: str) -> str:
    return ("" if language == "Chinese" else " ").join(DIGITS[language][int(digit)] for digit in text.split())


def _asked(name: str, level: int | None = None) -> AskedTag:
    return AskedTag(next(tag for tag in TAGS if tag.english == name), level)


def _draw(rng: np.random.Generator, choices: Iterable[str]) -> str:
    choices = list(choices)
    return choices[rng.integers(len(choices))]


def _draw_text(rng: np.random.Generator, num_words: int) -> tuple[str, str]:
    """(text, language) of as many words."""
    first = draw_utterance(rng)
    words = first.words
    while len(words) < num_words:
        following = draw_utterance(rng)
        words += following.words if following.language == first.language else []
    return (" " if first.language == "en" else "").join(words[:num_words]), LANGUAGE_NAMES[first.language]


def _draw_digits(rng: np.random.Generator) -> str:
    return " ".join(str(digit) for digit in rng.integers(10, size=rng.integers(2, 4)))


def _make(directory: Path, scale: float, seed: int) -> str:
    counts = make_instruction_corpus(directory, scale, seed)
    return ", ".join(f"{number} {split}" for split, number in counts.items())


if __name__ == "__main__":
    run_maker(__doc__, "scale", 1.0, "share of the full size (default 1)", _make)
