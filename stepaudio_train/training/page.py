"""Pieces of a self-contained HTML report: charts as inline SVG, tables, and the page around them."""

from __future__ import annotations

import base64
import html
import io
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name -> (x, y) of a line."""

_MAX_POINTS = 400
_WINDOW_SAMPLES = 512
_SHOWN_HZ = 8000
_PACKAGES = ("torch", "megatron-core", "megatron-energon", "hydra-core", "sentencepiece", "numpy", "stepaudio-train")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2430; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.note { color: #5a6275; max-width: 46rem; }
table { border-collapse: collapse; margin: .6rem 0; } th { text-align: left; font-weight: 600; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e3e6ee; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem; }
.charts svg { width: 100%; height: auto; }
pre { background: #f5f6fa; padding: .8rem; overflow-x: auto; font-size: .8rem; }
figure.sound { margin: 0; width: 11rem; } .sound img { width: 100%; height: 5rem; } .sound audio { width: 100%; }
code { font-size: .85em; word-break: break-word; } .wrong { color: #b3261e; } .right { color: #2c6e49; }
"""


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty one. Only then: matplotlib takes a second to import, in programs that report at their end."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def line_chart(title: str, x_label: str, y_label: str, series: Series, marks: Mapping[str, float] | None = None) -> str:
    """A chart as an SVG element; '' if no series has a point. `marks` are named vertical lines at x positions."""
    drawn = {name: points for name, points in series.items() if len(points[0])}
    if not drawn:
        return ""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    for name, (xs, ys) in drawn.items():
        xs, ys = _averaged(xs, ys)
        axes.plot(xs, ys, label=name, linewidth=1.4, marker="o" if len(xs) < 3 else None, markersize=4)
    for name, x in (marks or {}).items():
        axes.axvline(x, color="#9aa2b5", linewidth=0.8, linestyle="--")
        axes.annotate(name, (x, 1), xycoords=("data", "axes fraction"), fontsize=8, va="bottom", color="#5a6275")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, fontsize=11, loc="left", pad=14 if marks else 6)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False)
    return _svg(figure, title)


def bar_chart(title: str, x_label: str, values: Mapping[str, float]) -> str:
    """Horizontal bars as an SVG element, top to bottom; '' if there are none."""
    if not values:
        return ""
    figure = new_figure(6.4, 0.8 + 0.28 * len(values))
    axes = figure.subplots()
    bars = axes.barh(list(values), list(values.values()), color="#4c72b0", height=0.65)
    axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure, title)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table. Numbers are set right; floats with three decimals; None as a dash; text is escaped."""
    body = [list(row) for row in rows]
    numeric = [all(isinstance(row[i], (int, float, type(None))) for row in body) for i in range(len(header))]
    lines = ["<tr>" + "".join(_cell("th", name, right) for name, right in zip(header, numeric, strict=True)) + "</tr>"]
    for row in body:
        lines.append("<tr>" + "".join(_cell("td", v, right) for v, right in zip(row, numeric, strict=True)) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


@dataclass(frozen=True)
class Markup:
    """HTML that is ready as it is."""

    html: str


def judged(reference: str, hypothesis: str) -> Markup:
    """The hypothesis, green if it equals the reference and red otherwise."""
    kind = "right" if reference == hypothesis else "wrong"
    return Markup(f'<span class="{kind}">{html.escape(hypothesis) or "(nothing)"}</span>')


def player(path: Path, caption: str = "") -> Markup:
    """A sound file, its spectrogram and a line under them; all of it is put into the page."""
    waveform, sample_rate_hz = soundfile.read(path, dtype="float32")
    sound = base64.b64encode(path.read_bytes()).decode()
    picture = base64.b64encode(_spectrogram(waveform, sample_rate_hz)).decode()
    kind = "flac" if path.suffix == ".flac" else "wav"
    return Markup(
        f'<figure class="sound"><img alt="spectrogram" src="data:image/png;base64,{picture}">'
        f'<audio controls preload="none" src="data:audio/{kind};base64,{sound}"></audio>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A headed section of ready HTML parts; '' if all of them are empty."""
    if not any(parts):
        return ""
    text = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<h2>{html.escape(title)}</h2>{text}{''.join(parts)}"


def charts(*svgs: str) -> str:
    """Charts side by side where the window is wide enough."""
    drawn = [f"<figure style='margin:0'>{svg}</figure>" for svg in svgs if svg]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def details(summary: str, text: str) -> str:
    """Preformatted text that unfolds on a click."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """A whole HTML document that loads nothing from anywhere."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = f'<h1>{html.escape(title)}</h1><p class="note">{html.escape(lead)}</p>{"".join(sections)}'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'


def environment() -> dict[str, str]:
    """What ran: machine and package versions."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else _cpu_name()
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = re.findall(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def _spectrogram(waveform: NDArray[np.float32], sample_rate_hz: int) -> bytes:
    """[samples] as PNG: time to the right, up to 8 kHz upwards, the loudest 80 dB from dark to bright."""
    from matplotlib import image, mlab

    padded = np.pad(waveform, (0, max(0, 2 * _WINDOW_SAMPLES - len(waveform))))
    power, _, _ = mlab.specgram(padded, _WINDOW_SAMPLES, sample_rate_hz, noverlap=_WINDOW_SAMPLES * 3 // 4)
    shown = power[: round(len(power) * min(1.0, 2 * _SHOWN_HZ / sample_rate_hz))]
    decibels = 10 * np.log10(np.maximum(shown, 1e-12))
    loudest, picture = decibels.max(), io.BytesIO()
    image.imsave(picture, decibels, vmin=loudest - 80, vmax=loudest, cmap="magma", origin="lower", format="png")
    return picture.getvalue()


def _averaged(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most _MAX_POINTS points, each the mean of its neighbours."""
    width = -(-len(xs) // _MAX_POINTS)
    starts = range(0, len(xs), width)
    return [_mean(xs[s : s + width]) for s in starts], [_mean(ys[s : s + width]) for s in starts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    import matplotlib

    # With a salt and without a date the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "stepaudio", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _cell(tag: str, value: object, right: bool) -> str:
    if isinstance(value, Markup):
        text = value.html
    elif value is None:
        text = "-"
    elif isinstance(value, float):
        text = f"{value:,.3f}"
    elif isinstance(value, int):
        text = f"{value:,}"
    else:
        text = html.escape(str(value))
    return f'<{tag} class="number">{text}</{tag}>' if right else f"<{tag}>{text}</{tag}>"
