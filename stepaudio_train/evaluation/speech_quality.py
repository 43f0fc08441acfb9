"""Scores of synthesised speech: what a recogniser hears, whose voice it is, how it sounds, its pitch and its pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio import AudioError, read_audio
from stepaudio_train.data.sources import Refusal
from stepaudio_train.evaluation.contours import Contour
from stepaudio_train.evaluation.endpoint_recogniser import JudgeError
from stepaudio_train.evaluation.speech_judges import Judges
from stepaudio_train.evaluation.word_errors import character_error_rate, normalise, word_error_rate
from stepaudio_train.models.decoder.speaker import SpeakerEmbedding, SpeakerError

_CENTS_PER_SEMITONE = 100.0


@dataclass(frozen=True)
class SpeechPair:
    """Speech to be judged, and what it should be like."""

    id: str
    text: str
    """What it should say."""
    speech: Path
    reference: Path | None = None
    """A recording of the same text by the same voice; pitch and duration are compared with it."""
    voice: Path | None = None
    """Another recording of the voice that it should have, as the prompt; the reference if not given."""


@dataclass(frozen=True)
class Prosody:
    """How far pitch and pace of a recording are from its reference's. Sums, so that they can be added up."""

    num_frames: int
    """Of the reference's speech, 10 ms each."""
    num_voicing_errors: int
    """Frames that have a voice in one alone."""
    num_voiced: int
    """Frames that have a voice in both."""
    squared_cents: float
    """Squared pitch difference, summed over those."""
    duration_s: float
    """Of the speech, without the silence around it."""
    reference_duration_s: float


@dataclass(frozen=True)
class Score:
    """What the judges said of one pair; None where there is no judge, or nothing to judge."""

    id: str
    text: str
    heard: str | None = None
    speaker_similarity: float | None = None
    """Cosine."""
    quality: dict[str, float] = field(default_factory=dict)
    prosody: Prosody | None = None


def score_speech(pairs: Sequence[SpeechPair], judges: Judges) -> dict[str, Any]:
    """Judge all pairs and add up. What cannot be measured is absent, not zero.

    Returns:
        num_scored, num_refused, refused (name and reason each), utterances (a `Score` each), and over all utterances:
        wer, cer (percent of all words, of all letters), num_words, num_substitutions, num_deletions, num_insertions;
        speaker_similarity; the names of the quality judge; each a mean, with its num_NAME;
        pitch_rmse_cents over the frames that have a voice in both, num_voiced_frames; voicing_error_percent of frames;
        duration_error_percent, the mean of absolute differences by the reference's duration; num_prosody.

    Raises:
        UserError: a judge cannot judge at all.
    """
    shown = tqdm(pairs, desc="judge speech", unit="clip", dynamic_ncols=True)
    return add_up([score_pair(pair, judges) for pair in shown])


def add_up(outcomes: Sequence[Score | Refusal]) -> dict[str, Any]:
    """What `score_speech` returns, of what `score_pair` returned."""
    scores = [outcome for outcome in outcomes if isinstance(outcome, Score)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
    return {
        "num_scored": len(scores),
        "num_refused": len(refused),
        **_word_errors([score for score in scores if score.heard is not None]),
        **_means(scores),
        **_prosody([score.prosody for score in scores if score.prosody is not None]),
        "refused": [asdict(refusal) for refusal in refused],
        "utterances": [asdict(score) for score in scores],
    }


def compare_prosody(speech: Tensor, reference: Tensor) -> Prosody | None:
    """Pitch and pace of two recordings of one text; None if one is silent.

    Silence at both ends is left out, and the speech's pitch contour is stretched evenly to the reference's length.

    Args:
        speech, reference: [samples] float32 at 16 kHz.
    """
    contour, wanted_contour = Contour.of(speech), Contour.of(reference)
    found, wanted = _spoken_f0(contour), _spoken_f0(wanted_contour)
    if not len(found) or not len(wanted):
        return None
    found = found[np.linspace(0, len(found) - 1, len(wanted)).round().astype(int)]
    voiced = (found > 0) & (wanted > 0)
    cents = 12 * _CENTS_PER_SEMITONE * np.log2(found[voiced] / wanted[voiced])
    return Prosody(
        num_frames=len(wanted),
        num_voicing_errors=int(((found > 0) != (wanted > 0)).sum()),
        num_voiced=int(voiced.sum()),
        squared_cents=float(np.square(cents).sum()),
        duration_s=contour.loud_s,
        reference_duration_s=wanted_contour.loud_s,
    )


def _spoken_f0(contour: Contour) -> NDArray[np.float64]:
    """[frames] in Hz, from the first loud frame to the last."""
    places = np.flatnonzero(contour.loud)
    return contour.f0_hz[places[0] : places[-1] + 1].astype(np.float64) if len(places) else np.zeros(0)


def score_pair(pair: SpeechPair, judges: Judges) -> Score | Refusal:
    """What the judges say, or why they say nothing.

    Raises:
        UserError: a judge cannot judge at all.
    """
    try:
        return _score(pair, judges)
    except (AudioError, JudgeError) as error:
        return Refusal(pair.id, str(error))


def _score(pair: SpeechPair, judges: Judges) -> Score:
    """Raises:
    AudioError: a recording cannot be read. JudgeError: a judge passes, or there is no text to compare with.
    """
    speech = read_audio(pair.speech)
    reference = None if pair.reference is None else read_audio(pair.reference)
    voice = reference if pair.voice is None else read_audio(pair.voice)
    if judges.recogniser is not None and not normalise(pair.text):
        raise JudgeError(f"{pair.speech}: its text {pair.text!r} has no words; give what is spoken")
    return Score(
        id=pair.id,
        text=pair.text,
        heard=None if judges.recogniser is None else judges.recogniser.transcribe(speech),
        speaker_similarity=None if voice is None else _similarity(speech, voice, judges.speaker),
        quality={} if judges.quality is None else judges.quality.rate(speech),
        prosody=None if reference is None else compare_prosody(speech, reference),
    )


def _similarity(speech: Tensor, voice: Tensor, judge: SpeakerEmbedding | None) -> float | None:
    if judge is None:
        return None
    try:
        return float(torch.cosine_similarity(judge.embed(speech), judge.embed(voice), dim=0))
    except SpeakerError:  # too short; the words count all the same
        return None


def _word_errors(scores: Sequence[Score]) -> dict[str, float]:
    if not scores:
        return {}
    texts, heard = [score.text for score in scores], [score.heard or "" for score in scores]
    words = word_error_rate(texts, heard)
    return {
        "wer": words.percent,
        "cer": character_error_rate(texts, heard).percent,
        "num_words": words.num_words,
        "num_substitutions": words.substitutions,
        "num_deletions": words.deletions,
        "num_insertions": words.insertions,
    }


def _means(scores: Sequence[Score]) -> dict[str, float]:
    """Mean and number of each score that is a number a clip."""
    values: dict[str, list[float]] = {}
    for score in scores:
        similarity = {} if score.speaker_similarity is None else {"speaker_similarity": score.speaker_similarity}
        for name, value in (similarity | score.quality).items():
            values.setdefault(name, []).append(value)
    means = {name: float(np.mean(found)) for name, found in values.items()}
    return means | {f"num_{name}": len(found) for name, found in values.items()}


def _prosody(found: Sequence[Prosody]) -> dict[str, float]:
    if not found:
        return {}
    num_voiced = sum(prosody.num_voiced for prosody in found)
    wrong = sum(prosody.num_voicing_errors for prosody in found)
    ratios = [prosody.duration_s / prosody.reference_duration_s for prosody in found]
    numbers = {
        "voicing_error_percent": 100 * wrong / sum(prosody.num_frames for prosody in found),
        "duration_error_percent": float(100 * np.mean(np.abs(np.array(ratios) - 1))),
        "num_prosody": len(found),
        "num_voiced_frames": num_voiced,
    }
    if num_voiced:
        numbers["pitch_rmse_cents"] = float(np.sqrt(sum(prosody.squared_cents for prosody in found) / num_voiced))
    return numbers
