"""What `stepaudio evaluate control` found, for people. Everything here reads what control.json holds, and no more."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stepaudio_train.evaluation.control_measures import MOODS
from stepaudio_train.training.page import charts, line_chart, page, section, table

Found = Mapping[str, Any]

MIN_PITCH_R2 = 0.3
"""Of the probe: where it explains less, tokens do not carry pitch well enough to judge."""
_FEATURES = {"f0": "pitch", "f0_range": "range of pitch", "level": "loudness", "duration": "duration"}
_PROBED = {"f0": "pitch", "voicing": "voicing", "level": "loudness"}
_SHOWN_REFUSALS = 20
_LABELS = {
    "speed_control_spearman": ("speed: slower asked for, longer spoken (rank correlation)", "num_speed_answers"),
    "speed_pairs_in_order": ("speed: of two levels the faster is shorter (share)", "num_speed_pairs"),
    "edit_speed_spearman": ("edits: slower asked for, longer spoken (rank correlation)", "num_edit_speed_answers"),
    **{
        f"{mood}_{feature}_spearman": (f"{mood}: level and {title} (rank correlation)", f"num_{mood}_answers")
        for mood in MOODS
        for feature, title in _FEATURES.items()
    },
    "language_heard_share": ("language: heard as asked for (share)", "num_language_answers"),
    "melody_pearson": ("melody: notes asked for and sung (correlation)", "num_melody_answers"),
    "melody_spearman": ("melody: the same by ranks", "num_melody_answers"),
    "rap_interval_variation": ("RAP: spread of the time between onsets, by its mean", "num_rap_answers"),
    "untagged_interval_variation": ("without a tag: the same", "num_untagged_answers"),
    "rap_more_regular_share": ("RAP: more regular than without a tag (share of pairs)", "num_rap_answers"),
}
"""Measure -> what it says, and the name of what it counts."""
_NOTE = (
    "Beside each number stands what a model would get that is deaf to its instructions: the mean over 100 draws in "
    "which answers exchange their tags (for the melody: in which notes change places), and how far 95 % of the draws "
    'lie from it at most. True recordings show how much a measure can find at all; "from tokens" measures them as '
    "the answers are, which have no recordings."
)


@dataclass(frozen=True)
class Row:
    """One measure, as it is shown."""

    label: str
    answers: float
    deaf: str
    truth: float | None
    truth_from_tokens: float | None
    count: int


def rows(found: Found) -> Iterator[Row]:
    """The measures that there are."""
    for name, (label, count) in _LABELS.items():
        if name not in found:
            continue
        control = f"{name}_permuted_{'notes' if name.startswith('melody') else 'tags'}"
        deaf = f"{found[control]:.3f} ± {found[f'{control}_spread']:.3f}"
        beside = (found.get(f"{name}_{suffix}") for suffix in ("truth", "truth_from_tokens"))
        yield Row(label, found[name], deaf, *beside, found[count])


def control_table(found: Found) -> str:
    """For a terminal."""
    lines = [f"{'':<58}{'answers':>9}{'deaf to tags':>17}{'truth':>9}{'from tokens':>13}{'number':>9}"]
    lines += [
        f"{row.label:<58}{row.answers:>9.3f}{row.deaf:>17}{_shown(row.truth):>9}{_shown(row.truth_from_tokens):>13}"
        f"{row.count:>9}"
        for row in rows(found)
    ]
    lines += remarks(found)
    return "".join(f"{line}\n" for line in lines)


def remarks(found: Found) -> list[str]:
    """What a reader must know before believing the numbers."""
    said = [f"{found['num_answers']} answers"]
    if refused := found["num_refused"]:
        said.append(f"{refused} lines cannot be used; the first: {' '.join(found['refused'][0].values())}")
    if silent := found["num_answers_from_tokens"]:
        said.append(_of_tokens(silent, found.get("probe_f0_r2")))
    if missing := found.get("languages_not_in_reference"):
        said.append(f"{', '.join(missing)}: no such recordings in the reference, so it is not told whether it is heard")
    if (accuracy := found.get("language_classifier_accuracy_truth")) is not None:
        said.append(f"the language classifier is right on {accuracy:.1%} of the true recordings")
    return said


def control_section(found: Found) -> str:
    """An HTML section for any report.

    Args:
        found: what control.json holds.
    """
    head = ("", "answers", "deaf to tags", "true recordings", "from tokens", "number")
    body = [(r.label, r.answers, r.deaf, r.truth, r.truth_from_tokens, r.count) for r in rows(found)]
    probe = [(title, found[f"probe_{name}_r2"]) for name, title in _PROBED.items() if f"probe_{name}_r2" in found]
    return section(
        "Control: does speech do what its tags ask for?",
        *(f'<p class="note">{html.escape(line)}.</p>' for line in remarks(found)),
        table(head, body) if body else "",
        charts(*_charts(found)),
        _languages(found.get("languages_heard", {})),
        table(("share of the variance that tokens explain", "R2"), probe) if probe else "",
        note=_NOTE,
    )


def control_page(found: Found) -> str:
    """A whole HTML document."""
    refused = [(refusal["name"], refusal["reason"]) for refusal in found["refused"][:_SHOWN_REFUSALS]]
    listed = table(("line", "why"), refused) if refused else ""
    sections = [control_section(found), section(f"{found['num_refused']} lines that cannot be used", listed)]
    return page("Control by instruction tags", f"{found['num_answers']} spoken answers", sections)


def _of_tokens(number: int, pitch_r2: float | None) -> str:
    if pitch_r2 is None:
        return (
            f"{number} answers have tokens alone, whose pitch, loudness and rhythm are not measured; recordings with "
            "their tokens teach how tokens sound: --reference FILE"
        )
    if pitch_r2 < MIN_PITCH_R2:
        return (
            f"the tokens do not carry pitch well enough to judge it: {pitch_r2:.2f} of its variance is explained on "
            f"held-out recordings, at least {MIN_PITCH_R2} are wanted; {number} answers have tokens alone"
        )
    return f"pitch, loudness and rhythm of {number} answers are told from their tokens"


def _charts(found: Found) -> Iterator[str]:
    named = [
        ("duration_by_speed_level", "Duration by speed", "speed asked for, slow 5 to fast 5", "by the text's mean")
    ]
    named += [
        (f"f0_semitones_by_{mood}_level", f"Pitch by {mood} level", "level asked for, 0 without a tag", "semitones")
        for mood in MOODS
    ]
    for name, title, x_label, y_label in named:
        curves = {"answers": found.get(name, {}), "true recordings": found.get(f"{name}_truth", {})}
        yield line_chart(
            title, x_label, y_label, {k: (list(map(int, curve)), list(curve.values())) for k, curve in curves.items()}
        )


def _languages(heard: Mapping[str, Mapping[str, int]]) -> str:
    if not heard:
        return ""
    names = sorted({name for counts in heard.values() for name in counts})
    return table(
        ("asked for", *(f"heard {n}" for n in names)), ((a, *(c.get(n, 0) for n in names)) for a, c in heard.items())
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
