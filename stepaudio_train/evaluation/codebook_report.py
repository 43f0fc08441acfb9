"""What the codebook study found: summary.json for programs, curves.png and report.html for people."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from stepaudio_train.config.schema import SpeechLayout
from stepaudio_train.training.page import charts, line_chart, new_figure, page, section, table
from stepaudio_train.training.report import Metrics, read_metrics

LAYOUTS: tuple[SpeechLayout, ...] = get_args(SpeechLayout)
STREAMS = ("linguistic", "semantic")
_TITLES = {
    "interleaved": "both, interleaved 2:3",
    "linguistic": "linguistic alone",
    "semantic": "semantic alone",
    "sequential": "both, one after the other",
}


@dataclass(frozen=True)
class StudyResults:
    """Everything the parts of a study have written, read back: by layout, then by seed."""

    run: Path
    metrics: dict[str, list[Metrics]]
    evaluations: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, run: Path, seeds: int) -> StudyResults:
        """Read the folders LAYOUT_SEED of a finished study."""
        metrics, evaluations = {}, {}
        for layout in LAYOUTS:
            folders = [run / f"{layout}_{seed}" for seed in range(seeds)]
            metrics[layout] = [read_metrics(folder / "metrics.jsonl") for folder in folders]
            evaluations[layout] = [
                json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
                for folder in folders
            ]
        return cls(run, metrics, evaluations)

    def perplexities(self, layout: str, stream: str) -> list[float]:
        """Per held-out token, one for each seed; empty if the layout leaves the stream out."""
        found = [evaluation["likelihood"]["model"] for evaluation in self.evaluations[layout]]
        return [math.exp(nats[stream]) for nats in found if stream in nats]

    def word_errors(self, layout: str, held_out: str = "test") -> list[float]:
        """Percent, one for each seed."""
        return [evaluation["asr"][held_out]["percent"] for evaluation in self.evaluations[layout]]

    def lowered(self, stream: str) -> bool:
        """Whether interleaving gave the stream a lower perplexity than it has alone, on the mean over the seeds."""
        together, alone = self.perplexities("interleaved", stream), self.perplexities(stream, stream)
        return statistics.mean(together) < statistics.mean(alone)

    def summary(self) -> dict[str, Any]:
        """Means over the seeds, and the seeds' own figures."""
        layouts: dict[str, Any] = {}
        for layout in LAYOUTS:
            figures = {f"perplexity_{stream}": self.perplexities(layout, stream) for stream in STREAMS}
            figures |= {
                "asr_wer": self.word_errors(layout),
                "asr_wer_shuffled_audio": self.word_errors(layout, "test_shuffled_audio"),
            }
            layouts[layout] = {
                name: {"mean": statistics.mean(values), "seeds": values} for name, values in figures.items() if values
            }
        return {"layouts": layouts, **{f"interleaving_lowers_{stream}": self.lowered(stream) for stream in STREAMS}}

    def verdict(self) -> str:
        """One line for each stream, and one for recognition."""
        lines = []
        for stream in STREAMS:
            alone = statistics.mean(self.perplexities(stream, stream))
            together = statistics.mean(self.perplexities("interleaved", stream))
            word = "lower" if self.lowered(stream) else "NOT lower"
            lines.append(f"{stream} perplexity: {alone:.2f} alone, {together:.2f} interleaved: {word}")
        errors = (f"{statistics.mean(self.word_errors(layout)):.1f} {_TITLES[layout]}" for layout in LAYOUTS)
        return "\n".join([*lines, f"WER %: {'; '.join(errors)}"])


def write_study_report(results: StudyResults) -> Path:
    """Write curves.png and report.html into the run directory; returns the report's path."""
    _write_curves(results)
    rows = [
        (
            _TITLES[layout],
            *(_spread(results.perplexities(layout, stream)) for stream in STREAMS),
            _spread(results.word_errors(layout)),
            _spread(results.word_errors(layout, "test_shuffled_audio")),
        )
        for layout in LAYOUTS
    ]
    head = ("speech as", "linguistic perplexity", "semantic perplexity", "WER %", "WER %, shuffled audio")
    svgs = [
        line_chart(f"Held-out {stream} tokens", "steps", "perplexity", _curves(results, stream)) for stream in STREAMS
    ]
    note = (
        "Held-out recordings; models of the same size, the same recordings in every step. Perplexity is per token of "
        "the stream, given what stands before it: alone its own past, interleaved the past of both streams. One after "
        "the other, semantic tokens see all linguistic tokens of the recording, those of later speech too: their "
        "perplexity there answers another question. With several seeds: mean, lowest and highest."
    )
    path = results.run / "report.html"
    content = page(
        "Codebook study", results.verdict(), [section("Results", table(head, rows), charts(*svgs), note=note)]
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
    return path


def _curves(results: StudyResults, stream: str) -> dict[str, tuple[list[float], list[float]]]:
    """Title -> steps and perplexities of the first seed, without the first evaluation, which would set the scale."""
    found = {}
    for layout in LAYOUTS:
        key = f"val/loss/{stream}"
        points = [(line["step"], math.exp(line[key])) for line in results.metrics[layout][0] if key in line][1:]
        found[_TITLES[layout]] = ([x for x, _ in points], [y for _, y in points])
    return found


def _write_curves(results: StudyResults) -> None:
    figure = new_figure(10, 3.8)
    for axes, stream in zip(figure.subplots(1, 2), STREAMS, strict=True):
        for title, (xs, ys) in _curves(results, stream).items():
            if xs:
                axes.plot(xs, ys, label=title, linewidth=1.4)
        axes.set(title=f"Held-out {stream} tokens", xlabel="steps", ylabel="perplexity")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    temporary = results.run / "curves.tmp.png"
    figure.savefig(temporary, dpi=110)
    temporary.replace(results.run / "curves.png")


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"
