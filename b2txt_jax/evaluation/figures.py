"""Figures of a run, as matplotlib `Figure` objects (no window, no global state, no pyplot).

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Pictures use cividis for the
same reason.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from b2txt_jax.metrics import ErrorRate, differences
from b2txt_jax.phonemes import BLANK_ID, SILENCE_ID
from lm_server.atomic_file import replacing
from lm_server.protocol import CLASSES, check_logits

FRAME_SECONDS = 0.08
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5F6368"
_DPI = 160
_SILENCE_SIGN = "·"


@dataclass(frozen=True)
class Segment:
    """A decoded phoneme: class id and its frames, `start` to `end` (exclusive)."""

    phoneme: int
    start: int
    end: int


@dataclass(frozen=True)
class Mark:
    """A phoneme's name in a picture: class id, time in s, whether it is an error."""

    phoneme: int
    time: float
    wrong: bool


def greedy_segments(logits: np.ndarray) -> list[Segment]:
    """Return the phonemes of the greedy decoding with their frames: [P, 41] -> segments."""
    best = check_logits(logits).argmax(axis=1)
    edges = [0, *(np.flatnonzero(np.diff(best)) + 1).tolist(), len(best)]
    found = [Segment(int(best[a]), a, b) for a, b in itertools.pairwise(edges) if b > a]
    return [segment for segment in found if segment.phoneme != BLANK_ID]


def learning_curve(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the losses of training and validation, and the validation PER, against the step."""
    figure = _figure(7.2, 3.4)
    losses, rates = figure.subplots(1, 2)
    for kind, colour, name in (("train", BLUE, "training"), ("val", ORANGE, "validation")):
        steps, values = _series(metrics, kind, "loss")
        marker = "o" if len(steps) <= 40 and kind == "val" else None
        if steps:
            losses.plot(steps, values, color=colour, label=name, marker=marker, markersize=3.5)
    losses.set(xlabel="step", ylabel="CTC loss per sentence")
    _legend(losses)
    losses.set_ylim(bottom=0)
    title = "PER on validation"
    steps, values = _series(metrics, "val", "per")
    if steps:
        percent = [100 * value for value in values]
        marker = "o" if len(steps) <= 40 else None
        rates.plot(steps, percent, color=ORANGE, marker=marker, markersize=3.5)
        best = int(np.argmin(percent))
        rates.plot(steps[best], percent[best], "o", color=BLUE, markersize=8, fillstyle="none")
        rates.set_ylim(0, 1.08 * max(percent) or 1.0)
        title = f"PER on validation: best {percent[best]:.1f} % at step {steps[best]:,}"
    else:
        _empty(rates, "no validation yet")
    rates.set(xlabel="step", ylabel="phoneme error rate [%]")
    rates.set_title(title, fontsize=10)
    losses.set_title("Loss", fontsize=10)
    for axes in (losses, rates):
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _tidy(axes)
    return figure


def per_by_day(rates: Mapping[str, float | None]) -> Figure:
    """Draw the PER of each day as horizontal bars in the order of the days. None: no labels."""
    names = list(rates)
    figure = _figure(7.2, max(1.8, 0.9 + 0.27 * len(names)))
    axes = figure.subplots()
    values = [None if rates[name] is None else 100 * float(rates[name] or 0) for name in names]
    known = [value for value in values if value is not None]
    _bars(axes, names, values, BLUE)
    if len(known) > 1:
        mean = float(np.mean(known))
        axes.axvline(mean, color=ORANGE, linewidth=1.3, linestyle="--", zorder=1.5)
        axes.set_title(f"PER per day (dashed: mean of the days, {mean:.1f} %)")
    else:
        axes.set_title("PER per day")
    axes.set_xlabel("phoneme error rate [%]")
    return figure


def wer_bars(rows: Sequence[tuple[str, ErrorRate]]) -> Figure:
    """Draw word error rates side by side, each with its errors and words."""
    figure = _figure(7.2, max(1.7, 0.9 + 0.42 * len(rows)))
    axes = figure.subplots()
    names = [name for name, _ in rows]
    values = [None if rate.rate is None else 100 * rate.rate for _, rate in rows]
    notes = [f"({rate.errors:,} of {rate.length:,} words)" for _, rate in rows]
    _bars(axes, names, values, GREEN, notes)
    axes.set(xlabel="word error rate [%]", title="WER")
    return figure


def phoneme_picture(
    logits: np.ndarray, label: np.ndarray | None = None, title: str = "Phoneme probabilities"
) -> Figure:
    """Draw class probabilities over time, with decoded phonemes above and true ones beneath.

    Args:
      logits: [P, 41] in the RNN's order, one row per 80 ms.
      label: true class ids [L]. They carry no times, so each stands under its decoded partner of
        the best alignment, and one without partner between its neighbours.
      title: heading, such as the trial's name.
    """
    logits = check_logits(logits)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    seconds = len(logits) * FRAME_SECONDS
    segments = greedy_segments(logits)
    times = [(segment.start + segment.end) / 2 * FRAME_SECONDS for segment in segments]
    found = [segment.phoneme for segment in segments]
    true = [] if label is None else [int(index) for index in label]
    decoded_marks, true_marks = _aligned(found, times, true, seconds)
    if not true:
        decoded_marks = [replace(mark, wrong=False) for mark in decoded_marks]
    width = float(np.clip(1.5 + 0.15 * max(len(found), len(true)), 9.0, 30.0))
    figure = _figure(width, 7.6)
    ratios = [1.0, 10.0, 1.0] if true else [1.0, 10.0]
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    image = panels[1].imshow(
        probabilities.T,
        aspect="auto",
        origin="upper",
        interpolation="nearest",
        cmap="cividis",
        vmin=0.0,
        vmax=1.0,
        extent=(0.0, seconds, len(CLASSES) - 0.5, -0.5),
    )
    panels[1].set_yticks(range(len(CLASSES)), [_name(index) for index in range(len(CLASSES))])
    panels[1].tick_params(axis="y", labelsize=7.5, length=2)
    bar = figure.colorbar(image, ax=panels[1], fraction=0.03, pad=0.01)
    bar.set_label("probability")
    inches = seconds / (0.86 * width)  # seconds that an inch of the picture shows
    _strip(panels[0], decoded_marks, "decoded", inches)
    panels[0].set_title(title, loc="left", fontsize=11)
    if true:
        _strip(panels[2], true_marks, "true", inches)
        panels[2].set_xlabel("time [s]; boxed: decoded and true phonemes differ")
    else:
        panels[1].set_xlabel("time [s]")
    panels[0].set_xlim(0, seconds)
    panels[-1].tick_params(axis="x", labelbottom=True, bottom=True)
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """Return the figure as `data:` URL, for a page that loads nothing."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode()


def save_png(path: Path, figure: Figure) -> None:
    """Write the figure, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(png(figure))


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _series(
    metrics: Sequence[Mapping[str, Any]], kind: str, key: str
) -> tuple[list[int], list[float]]:
    found = [
        (int(entry["step"]), float(entry[key]))
        for entry in metrics
        if entry["kind"] == kind and entry.get(key) is not None and np.isfinite(entry[key])
    ]
    # A resumed run repeats the steps since its checkpoint: the later line counts.
    series = sorted(dict(found).items())
    return [step for step, _ in series], [value for _, value in series]


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float | None],
    colour: str,
    notes: Sequence[str] | None = None,
) -> None:
    known = [value for value in values if value is not None]
    positions = range(len(names))
    axes.barh(positions, [value or 0.0 for value in values], color=colour, height=0.68)
    for position, value in enumerate(values):
        text = "no labels" if value is None else f"{value:.1f} %"
        note = f" {notes[position]}" if notes else ""
        axes.annotate(
            text + note,
            (value or 0.0, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axes.set_yticks(positions, names)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    room = 1.6 if notes else 1.12
    axes.set_xlim(0, room * max(known, default=1.0) or 1.0)
    _tidy(axes, grid="x")
    if not names:
        _empty(axes, "nothing to show")


def _aligned(
    found: Sequence[int], times: Sequence[float], true: Sequence[int], seconds: float
) -> tuple[list[Mark], list[Mark]]:
    """Return marks of the decoded and the true phonemes, the latter at their partners' times."""
    wrong_found: list[bool] = []
    wrong_true: list[bool] = []
    partners: list[tuple[int, float]] = [(-1, 0.0)]  # (place in `true`, time)
    for stretch in differences(true, found):
        both = min(len(stretch.reference), len(stretch.decoded))
        start, begin = len(wrong_true), len(wrong_found)
        partners += [(start + n, times[begin + n]) for n in range(both)]
        wrong_true += [not stretch.same] * len(stretch.reference)
        wrong_found += [not stretch.same] * len(stretch.decoded)
    places, known = zip(*partners, (len(true), seconds), strict=True)
    spread = np.interp(range(len(true)), places, known)
    return (
        [Mark(*mark) for mark in zip(found, times, wrong_found, strict=True)],
        [Mark(*mark) for mark in zip(true, spread.tolist(), wrong_true, strict=True)],
    )


def _strip(axes: Axes, marks: Sequence[Mark], name: str, seconds_per_inch: float) -> None:
    """Write phoneme names at their times in the first of three rows with room, errors boxed."""
    axes.set_ylim(0, 1)
    axes.set_yticks([0.5], [name])
    axes.tick_params(axis="both", length=0, labelbottom=False)
    axes.spines[:].set_visible(False)
    ends = [-np.inf] * 3
    for mark in marks:
        text = _name(mark.phoneme, short=True)
        half = 0.5 * (0.1 + 0.1 * len(text)) * seconds_per_inch
        row = next((n for n, end in enumerate(ends) if end <= mark.time - half), np.argmin(ends))
        ends[int(row)] = mark.time + half
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": ORANGE}
        axes.text(
            mark.time,
            0.84 - 0.34 * row,
            text,
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold",
            color=ORANGE if mark.wrong else GREY if mark.phoneme == SILENCE_ID else BLUE,
            bbox=box if mark.wrong else None,
        )


def _name(index: int, short: bool = False) -> str:
    if index == SILENCE_ID:
        return _SILENCE_SIGN if short else "silence"
    return "blank" if index == BLANK_ID else CLASSES[index]


def _tidy(axes: Axes, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    else:
        _empty(axes, "no steps yet")


def _empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GREY)
