"""`stepaudio evaluate speech`: sound files with their texts, judged, and their references beside them."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from tqdm import tqdm

from stepaudio_train.commands.processes import die_with_parent
from stepaudio_train.commands.speech_lines import read_lines
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.judges import JudgeOptions
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.sources import Refusal
from stepaudio_train.evaluation.speech_judges import Judges, build_judges
from stepaudio_train.evaluation.speech_quality import Score, SpeechPair, add_up, score_pair

_CLIPS_PER_WORKER = 16
"""Fewer are judged sooner than another process has started."""
_CLIPS_AT_ONCE = 4
_SHOWN_REFUSALS = 5
_SHOWN_SCORES = {
    "num_scored": ("clips judged", 0),
    "num_refused": ("left out", 0),
    "wer": ("words misheard, %", 1),
    "cer": ("letters misheard, %", 1),
    "speaker_similarity": ("voice, cosine", 3),
    "dnsmos_signal": ("DNSMOS signal, 1 to 5", 2),
    "dnsmos_background": ("DNSMOS background, 1 to 5", 2),
    "dnsmos_overall": ("DNSMOS overall, 1 to 5", 2),
    "pitch_rmse_cents": ("pitch error, cents", 0),
    "voicing_error_percent": ("voicing error, %", 1),
    "duration_error_percent": ("duration error, %", 1),
}
"""What it is called for people, and with how many decimals."""


@dataclass(frozen=True)
class SpeechOptions:
    """What `stepaudio evaluate speech` is asked for, besides who judges."""

    file: Path
    """JSONL, a `SpeechLine` each."""
    output: Path
    """Folder for speech.json."""
    references: bool = False
    """Judge the references too, as if they had been made: a score says little without theirs."""
    num_workers: int | None = None
    """Processes that judge; None: by cores and number of clips, and one for Whisper, which is large."""


@dataclass(frozen=True)
class SpeechLine:
    """A sound file to be judged; paths are relative to the file of lines. As `SpeechPair`."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    text: str
    speech: str
    reference: str | None = None
    voice: str | None = None

    def pair(self, folder: Path) -> SpeechPair:
        """With whole paths."""
        reference, voice = (None if path is None else folder / path for path in (self.reference, self.voice))
        return SpeechPair(self.id, self.text, folder / self.speech, reference, voice)


def evaluate_speech(options: SpeechOptions, judges: JudgeOptions) -> dict[str, Any]:
    """Judge every line and write speech.json, which holds what is returned.

    Returns:
        speech and, with `references`, reference: each as `score_speech`. Lines that are none are among the refused of
        speech, by file:line.

    Raises:
        UserError: no usable line, or judges that cannot be had.
    """
    lines = list(read_lines(options.file, SpeechLine))
    refused = [line for line in lines if isinstance(line, Refusal)]
    pairs = [line.line.pair(line.folder) for line in lines if not isinstance(line, Refusal)]
    if not pairs:
        why = f": {refused[0].name}: {refused[0].reason}" if refused else ""
        raise UserError(f"{options.file}: holds no line that can be used{why}; docs/speech_decoder.md has the fields")
    references = [replace(p, speech=p.reference, reference=None) for p in pairs if options.references and p.reference]
    outcomes = judge_pairs([*pairs, *references], replace(judges, words=_words(judges.words)), options.num_workers)
    result = {"speech": add_up([*refused, *outcomes[: len(pairs)]])}
    if options.references:
        result["reference"] = add_up(outcomes[len(pairs) :])
    write_atomically(options.output / "speech.json", json.dumps(result, indent=1, ensure_ascii=False).encode())
    return result


def speech_summary(result: Mapping[str, Any]) -> str:
    """For the terminal: a row a score, a column for what was judged."""
    lines = [f"{'':<28}" + "".join(f"{column:>11}" for column in result)]
    for name, (label, decimals) in _SHOWN_SCORES.items():
        cells = [f"{scores[name]:11.{decimals}f}" if name in scores else f"{'-':>11}" for scores in result.values()]
        if any(name in scores for scores in result.values()):
            lines.append(f"{label:<28}{''.join(cells)}")
    for column, scores in result.items():
        refused = scores["refused"]
        lines += [f"left out of {column}: {one['name']}: {one['reason']}" for one in refused[:_SHOWN_REFUSALS]]
        if len(refused) > _SHOWN_REFUSALS:
            lines.append(f"left out of {column}: {len(refused)} in all; speech.json names them")
    return "\n".join(lines) + "\n"


def judge_pairs(
    pairs: Sequence[SpeechPair], options: JudgeOptions, num_workers: int | None = None
) -> list[Score | Refusal]:
    """As `score_pair` says of each, in order, however many processes share them.

    Raises:
        UserError: judges that cannot be had, or no process.
    """
    _judges(options)  # what cannot be had is told before any process starts
    if num_workers is None:
        wanted = min(os.cpu_count() or 1, math.ceil(len(pairs) / _CLIPS_PER_WORKER))
        num_workers = 1 if options.recogniser.startswith("whisper") else wanted
    if num_workers < 1:
        raise UserError(f"--num-workers {num_workers}: must be at least 1")
    shown = {"total": len(pairs), "desc": "judge speech", "unit": "clip", "dynamic_ncols": True}
    judge = partial(_judge, options)
    if num_workers == 1:
        return list(tqdm(map(judge, pairs), **shown))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _begin_worker) as pool:
        return list(tqdm(pool.map(judge, pairs, chunksize=_CLIPS_AT_ONCE), **shown))


def _begin_worker() -> None:
    die_with_parent()
    torch.set_num_threads(1)


def _judge(options: JudgeOptions, pair: SpeechPair) -> Score | Refusal:
    return score_pair(pair, _judges(options))


@lru_cache(maxsize=1)
def _judges(options: JudgeOptions) -> Judges:
    """This process's."""
    return build_judges(options)


def _words(given: Sequence[str]) -> tuple[str, ...]:
    """Words as they are, and those in files."""
    return tuple(
        word for one in given for word in (Path(one).read_text("utf-8").split() if Path(one).is_file() else [one])
    )
