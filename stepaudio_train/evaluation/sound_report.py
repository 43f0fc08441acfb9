"""What `stepaudio run evaluate_decoder` found, for people and as a summary. It reads what speech.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepaudio_train.training.page import player, section, table

Found = Mapping[str, Any]

_SHOWN_RECORDINGS = 6
_TITLES = {
    "reference": "the recording itself",
    "resynthesis": "its tokens as sound",
    "resynthesis_shuffled_tokens": "control: its tokens, shuffled",
    "synthesis": "its text, spoken by the language model",
    "synthesis_shuffled_tokens": "control: the same, tokens shuffled",
}
_SUMMARISED = {
    "reference_wer": "reference",
    "resynthesis_wer": "resynthesis",
    "resynthesis_wer_shuffled_tokens": "resynthesis_shuffled_tokens",
    "tts_wer": "synthesis",
    "tts_wer_shuffled_tokens": "synthesis_shuffled_tokens",
}
_COLUMNS = {
    "wer": "WER, %",
    "cer": "CER, %",
    "num_words": "words",
    "speaker_similarity": "likeness of the voice",
    "dnsmos_overall": "DNSMOS overall",
    "pitch_rmse_cents": "pitch error, cents",
    "duration_error_percent": "duration error, %",
}


def speech_summary(found: Found) -> dict[str, float | None]:
    """Word error rates in percent; None where the recogniser knows none of the words, or there was no model."""
    kinds = found["kinds"]
    wers = {name: kinds.get(kind, {}).get("wer") for name, kind in _SUMMARISED.items()}
    return {name: None if wer is None else round(wer, 2) for name, wer in wers.items()}


def sound_section(folder: Path, found: Found) -> str:
    """Scores of every kind of sound, and some to listen to.

    Args:
        folder: holds speech.json and the sounds.
    """
    kinds, sounds = found["kinds"], found["sounds"]
    rows = [(_TITLES[kind], *(scores.get(column) for column in _COLUMNS)) for kind, scores in kinds.items()]
    texts = {one["id"]: one["text"] for one in kinds["reference"]["utterances"]}
    # The longest texts tell most.
    shown = sorted(texts, key=lambda id: -len(texts[id].split()))[:_SHOWN_RECORDINGS]
    heard = {kind: {one["id"]: one["heard"] for one in scores["utterances"]} for kind, scores in kinds.items()}
    players = [
        (texts[id], *(player(folder / sounds[kind][id], heard[kind].get(id) or "") for kind in kinds)) for id in shown
    ]
    tagged = [
        (one["tags"] or "(none)", one["text"], player(folder / one["reference"]), player(folder / one["sound"]))
        for one in found["tagged"]
    ]
    asked = ("asked for", "text", "a recording of it", "spoken by the fine-tuned model")
    return section(
        "Sound",
        table(("", *_COLUMNS.values()), rows),
        table(("text", *(_TITLES[kind] for kind in kinds)), players),
        *(["<h3>As the instruction tags ask</h3>", table(asked, tagged)] if tagged else []),
        note="Made by a speech decoder that learned from the same recordings in minutes. Judged by "
        f"{found['recogniser']}, which had no part in the training; what it makes of the recordings themselves is the "
        "measure of the rest. Under each sound: what it heard.",
    )
