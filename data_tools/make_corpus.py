"""Make a small labelled speech corpus with espeak-ng: numbers and short commands in English and Mandarin.

    python -m data_tools.make_corpus OUT --minutes 60 --seed 0

Writes OUT/wav/*.wav (22,050 Hz mono) and OUT/manifest.jsonl, one recording a line with its transcript, language,
speaker, duration and the span of every word. About half a minute for an hour of speech; the `espeakng-loader` wheel
brings the synthesiser and its voices.

espeak-ng says the same text in the same voice, rate and pitch always alike. So no two recordings share all four, each
has noise of its own under it, and identical samples are refused: whatever is held out was not heard in training.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
from rich.progress import track

ENGLISH = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "go",
    "stop",
    "left",
    "right",
    "up",
    "down",
    "on",
    "off",
)
MANDARIN = {
    "零": "ling2",
    "一": "yi1",
    "二": "er4",
    "三": "san1",
    "四": "si4",
    "五": "wu3",
    "六": "liu4",
    "七": "qi1",
    "八": "ba1",
    "九": "jiu3",
    "开": "kai1",
    "关": "guan1",
}
PRONOUNCED = dict(MANDARIN)
"""Word -> what espeak is given: from Mandarin characters alone it would make some neighbours into other words."""
SPEAKERS = (
    # None with breath: espeak-ng makes it from random numbers that it seeds with the time.
    ("en", "en-us+m1"),
    ("en", "en-us+m3"),
    ("en", "en-us+f1"),
    ("en", "en+m2"),
    ("en", "en-gb-x-rp+f4"),
    ("zh", "cmn-latn-pinyin+m1"),
    ("zh", "cmn-latn-pinyin+m4"),
    ("zh", "cmn-latn-pinyin+f1"),
)
MANDARIN_SHARE = 0.3
LENGTH_SHARES = (0.45, 0.35, 0.2)
"""Of utterances of one word, two words, and so on. Short ones are many: a model learns words before sentences."""
RATE_WPM = (105, 175)
PITCH = (30, 70)
"""Of espeak's 0-99."""


@dataclass(frozen=True)
class Utterance:
    """What is said, by whom and how; no two of a corpus are equal."""

    text: str
    language: str
    speaker: str
    rate_wpm: int
    pitch: int
    pitch_range: int = 50
    """How much the pitch moves, of espeak's 0-99; 0 is monotone."""

    @property
    def words(self) -> list[str]:
        """English words, or single Mandarin characters."""
        return list(self.text) if self.language == "zh" else self.text.split()


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
# Constants of speak_lib.h.
_OUTPUT_SYNCHRONOUS, _CHARS_UTF8, _POSITION_CHARACTER = 2, 1, 1
_PARAMETER_RATE, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 3, 4
_EVENT_LIST_TERMINATED, _EVENT_WORD = 0, 1


class Espeak:
    """espeak-ng in this process. Its state is global: make one."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate_hz = int(self._library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, data, 0))
        if self.sample_rate_hz <= 0:
            raise RuntimeError(f"espeak-ng finds no voices in {data.decode()}; type: pip install espeakng-loader")
        self._pcm: list[bytes] = []
        self._word_starts: list[int] = []
        self._callback = _CALLBACK(self._receive)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def synthesise(self, utterance: Utterance) -> tuple[np.ndarray, list[int]]:
        """Speech [samples] float32 in -1..1, and the sample at which each word starts."""
        self._pcm.clear()
        self._word_starts.clear()
        if self._library.espeak_SetVoiceByName(utterance.speaker.encode()):
            raise RuntimeError(f"espeak-ng has no voice {utterance.speaker!r}")
        self._library.espeak_SetParameter(_PARAMETER_RATE, utterance.rate_wpm, 0)
        self._library.espeak_SetParameter(_PARAMETER_PITCH, utterance.pitch, 0)
        self._library.espeak_SetParameter(_PARAMETER_RANGE, utterance.pitch_range, 0)
        text = " ".join(PRONOUNCED.get(word, word) for word in utterance.words).encode()
        failed = self._library.espeak_Synth(
            text, ctypes.c_size_t(len(text) + 1), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if failed or not self._pcm:
            raise RuntimeError(f"espeak-ng could not say {utterance.text!r} as {utterance.speaker!r}")
        return np.frombuffer(b"".join(self._pcm), np.int16).astype(np.float32) / 32768, list(self._word_starts)

    def _receive(self, samples: ctypes._Pointer, num_samples: int, events: ctypes._Pointer) -> int:
        if samples:
            self._pcm.append(ctypes.string_at(samples, num_samples * 2))
        index = 0
        while events[index].type != _EVENT_LIST_TERMINATED:
            if events[index].type == _EVENT_WORD:
                self._word_starts.append(events[index].sample)
            index += 1
        return 0


def draw_utterance(rng: np.random.Generator) -> Utterance:
    """A few words by a random speaker of their language."""
    language = "zh" if rng.random() < MANDARIN_SHARE else "en"
    words = list(MANDARIN) if language == "zh" else ENGLISH
    said = [words[i] for i in rng.integers(len(words), size=1 + rng.choice(len(LENGTH_SHARES), p=LENGTH_SHARES))]
    speakers = [name for spoken, name in SPEAKERS if spoken == language]
    return Utterance(
        text=("" if language == "zh" else " ").join(said),
        language=language,
        speaker=speakers[rng.integers(len(speakers))],
        rate_wpm=int(rng.integers(RATE_WPM[0], RATE_WPM[1] + 1)),
        pitch=int(rng.integers(PITCH[0], PITCH[1] + 1)),
    )


@dataclass(frozen=True)
class Room:
    """How speech is recorded; each value is drawn between two."""

    pause_s: tuple[float, float] = (0.05, 0.15)
    """Silence before and after the speech."""
    noise_db: tuple[float, float] = (-70.0, -50.0)
    """Level of the noise under a recording, relative to full scale."""
    peak: tuple[float, float] = (0.3, 0.9)


NOISY_ROOM = Room()


def record(
    speech: np.ndarray, sample_rate_hz: int, rng: np.random.Generator, room: Room = NOISY_ROOM
) -> tuple[np.ndarray, int]:
    """Speech as recorded: [samples] float32 with silence around it, a level and noise, and where the speech starts."""
    before, after = (int(rng.uniform(*room.pause_s) * sample_rate_hz) for _ in range(2))
    wave = np.pad(speech * (rng.uniform(*room.peak) / max(np.abs(speech).max(), 1e-4)), (before, after))
    noise = rng.standard_normal(wave.size) * 10 ** (rng.uniform(*room.noise_db) / 20)
    return (wave + noise).clip(-1, 1).astype(np.float32), before


def make_corpus(directory: Path, minutes: float, seed: int) -> float:
    """Write the corpus into `directory`, which must not exist; returns its length in minutes.

    Raises:
        FileExistsError: something is there already.
    """
    (directory / "wav").mkdir(parents=True)
    espeak = Espeak()
    rng = np.random.default_rng(seed)
    rate = espeak.sample_rate_hz
    seen_utterances: set[Utterance] = set()
    seen_samples: set[bytes] = set()
    target = int(minutes * 60 * rate)
    written = 0
    with (directory / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
        for percent in track(range(1, 101), "corpus", transient=True):
            while written < target * percent // 100:
                utterance = draw_utterance(rng)
                if utterance in seen_utterances:
                    continue
                speech, starts = espeak.synthesise(utterance)
                wave, start = record(speech, rate, rng)
                digest = hashlib.sha256(wave.tobytes()).digest()
                if digest in seen_samples:
                    raise RuntimeError(f"two recordings are identical: {utterance}")
                name = f"wav/{len(seen_utterances):06d}.wav"
                seen_utterances.add(utterance)
                seen_samples.add(digest)
                written += wave.size
                soundfile.write(directory / name, wave, rate, subtype="PCM_16")
                edges = [(start + edge) / rate for edge in (*starts, speech.size)]
                manifest.write(json.dumps(_line(utterance, name, wave.size / rate, edges), ensure_ascii=False) + "\n")
    return written / rate / 60


def _line(utterance: Utterance, name: str, duration_s: float, edges_s: list[float]) -> dict[str, object]:
    words = utterance.words
    if len(edges_s) != len(words) + 1:
        raise RuntimeError(f"espeak-ng gave {len(edges_s) - 1} words for {utterance.text!r}")
    spans = [
        {"start_s": round(a, 4), "end_s": round(b, 4), "text": word}
        for (a, b), word in zip(pairwise(edges_s), words, strict=True)
    ]
    fields = {key: value for key, value in asdict(utterance).items() if key in ("text", "language", "speaker")}
    return {"audio": name, **fields, "duration_s": round(duration_s, 4), "spans": spans}


def run_maker(
    description: str | None, size: str, default: float, size_help: str, make: Callable[[Path, float, int], str]
) -> None:
    """A corpus maker's command line: OUT, its size and a seed. OUT is there when it is whole, and not before.

    Args:
        size: name of the option.
        make: writes into the folder it is given, and returns what to say about it.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="where to write; must not exist")
    parser.add_argument(f"--{size}", dest="size", type=float, default=default, help=size_help)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} exists; remove it or name another folder")
    partial = arguments.directory.with_name(arguments.directory.name + ".partial")
    if (partial / "wav").is_dir():
        shutil.rmtree(partial)  # an interrupted run left it
    made = make(partial, arguments.size, arguments.seed)
    partial.rename(arguments.directory)
    sys.stderr.write(f"{made} in {arguments.directory}\n")


def _make(directory: Path, minutes: float, seed: int) -> str:
    return f"{make_corpus(directory, minutes, seed):.1f} minutes of speech"


if __name__ == "__main__":
    run_maker(__doc__, "minutes", 60.0, "length of the corpus (default 60)", _make)
