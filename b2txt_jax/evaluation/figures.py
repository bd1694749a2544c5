"""Figures of a run, as matplotlib `Figure` objects (no window, no global state, no pyplot).

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Pictures use cividis for the
same reason.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from b2txt_jax.metrics import differences
from b2txt_jax.phonemes import BLANK_ID, SILENCE_ID
from lm_server.files.atomic_file import replacing
from lm_server.protocol import CLASSES, check_logits

FRAME_SECONDS = 0.08
"""Of the published logits."""
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5F6368"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of several runs."""
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


@dataclass(frozen=True)
class Curves:
    """A run's entries of metrics.jsonl, and its learning rate by step."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    learning_rate: Callable[[np.ndarray], Any]


def learning_curves(runs: Sequence[Curves]) -> Figure:
    """Draw the losses, the PER on validation, the learning rate and the norm of the gradient."""
    figure = _figure(7.2, 5.6)
    panels = figure.subplots(2, 2)
    losses, rates, learning, norms = panels.flat
    title = "PER on validation"
    for run, colour in zip(runs, itertools.cycle(PALETTE)):
        single = len(runs) == 1
        name = "" if single else f"{run.name}, "
        steps, values = _series(run.metrics, "train", "loss")
        losses.plot(steps, values, color=colour, label=f"{name}training")
        if steps:
            shown = np.arange(steps[-1] + 1)
            learning.plot(shown, np.asarray(run.learning_rate(shown)), color=colour, label=run.name)
        norms.plot(*_series(run.metrics, "train", "gradient_norm"), color=colour)
        second = ORANGE if single else colour
        steps, values = _series(run.metrics, "val", "loss")
        marker = "o" if len(steps) <= 40 else None
        style = {"color": second, "marker": marker, "markersize": 3.5}
        losses.plot(steps, values, linestyle="--", label=f"{name}validation", **style)
        steps, values = _series(run.metrics, "val", "per")
        if steps:
            percent = [100 * value for value in values]
            rates.plot(steps, percent, label=run.name, **style)
            best = int(np.argmin(percent))
            rates.plot(steps[best], percent[best], "o", color=colour, ms=8, fillstyle="none")
            title += f": best {percent[best]:.1f} % at step {steps[best]:,}" if single else ""
    losses.set(title="Loss", ylabel="CTC loss per sentence")
    rates.set(title=title, ylabel="phoneme error rate [%]")
    learning.set(title="Learning rate", ylabel="learning rate")
    norms.set(title="Gradient", ylabel="norm before clipping")
    for axes in panels.flat:
        axes.set_xlabel("step")
        axes.title.set_fontsize(10)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _tidy(axes)
        if any(len(line.get_xdata()) for line in axes.lines):
            axes.set_ylim(bottom=0)
        else:
            _empty(axes, "no validation yet" if axes is rates else "no steps yet")
    if losses.lines and len(runs) <= 4:
        losses.legend(frameon=False, fontsize=8)
    if len(runs) > 1:
        learning.legend(frameon=False, fontsize=8)
    return figure


@dataclass(frozen=True)
class Point:
    """A rate with its interval (1.0 = 100 %). None: unknown."""

    rate: float | None
    low: float | None = None
    high: float | None = None


def rates_by_group(title: str, panels: Mapping[str, Mapping[str, Mapping[str, Point]]]) -> Figure:
    """Draw rates and intervals of groups, side by side for each kind of rate.

    `panels`: kind of rate, such as "phoneme error rate" -> run -> group -> rate.
    """
    names = list(dict.fromkeys(g for runs in panels.values() for run in runs.values() for g in run))
    series = list(dict.fromkeys(run for runs in panels.values() for run in runs))
    rows = max(1, len(names)) * (1 + 0.35 * (len(series) - 1))
    figure = _figure(7.2, 1.2 + 0.27 * rows + (0.2 * len(series) if len(series) > 1 else 0))
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (kind, runs) in zip(drawn, panels.items(), strict=True):
        ends = [0.0]
        for number, (run, colour) in enumerate(zip(series, itertools.cycle(PALETTE))):
            shift = 0.7 * ((number + 0.5) / len(series) - 0.5)
            for position, name in enumerate(names):
                point = runs.get(run, {}).get(name)
                if point is None or point.rate is None:
                    continue
                low, high = point.low, point.high
                place = position + shift
                if low is not None and high is not None:
                    axes.plot([100 * low, 100 * high], [place] * 2, color=colour, lw=1.6)
                    ends.append(100 * high)
                axes.plot(100 * point.rate, place, "o", color=colour, ms=4.5)
                ends.append(100 * point.rate)
        axes.set(xlabel=f"{kind} [%]", xlim=(0, 1.08 * max(ends) or 1.0))
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        _tidy(axes)
    figure.suptitle(title, fontsize=11)
    if len(series) > 1:
        for run, colour in zip(series, itertools.cycle(PALETTE)):
            drawn[0].plot([], [], "o-", color=colour, label=run)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def confusion_picture(counts: np.ndarray) -> Figure:
    """Draw for each true phoneme (row) what it was decoded as: int [41, 41], the blank is nothing.

    A row is divided by the number of times that the phoneme was said. That of inventions is divided
    by all phonemes that were said.
    """
    said = counts.sum(1).astype(float)
    said[BLANK_ID] = said[1:].sum()
    shares = counts / np.maximum(said, 1)[:, None]
    # The blank, which stands for nothing, at the end.
    order = [*range(1, len(CLASSES)), BLANK_ID]
    figure = _figure(7.2, 6.6)
    axes = figure.subplots()
    image = axes.imshow(
        100 * shares[np.ix_(order, order)],
        cmap="cividis",
        norm=PowerNorm(0.4, vmin=0, vmax=100),
        interpolation="nearest",
    )
    names = [_name(index) for index in order[:-1]]
    axes.set_xticks(range(len(order)), [*names, "missed"], rotation=90, fontsize=6.5)
    axes.set_yticks(range(len(order)), [*names, "invented"], fontsize=6.5)
    axes.set(xlabel="decoded", ylabel="true")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=[0, 1, 5, 20, 50, 100])
    bar.set_label("of the true phoneme [%], scale stretched near 0")
    return figure


def phoneme_errors(
    substitutions: np.ndarray, deletions: np.ndarray, insertions: np.ndarray
) -> Figure:
    """Draw the errors of each phoneme, the most frequent first: int [41] each."""
    kinds = {"substituted": substitutions, "missed": deletions, "invented": insertions}
    every = substitutions + deletions + insertions
    order = [int(i) for i in np.argsort(-every, kind="stable") if every[i]]
    figure = _figure(7.2, 1.2 + 0.17 * len(order))
    axes = figure.subplots()
    start = np.zeros(len(order))
    for (kind, counts), colour in zip(kinds.items(), (BLUE, ORANGE, GREEN), strict=True):
        axes.barh(range(len(order)), counts[order], left=start, color=colour, label=kind)
        start = start + counts[order]
    axes.set_yticks(range(len(order)), [_name(index) for index in order], fontsize=7.5)
    axes.set_ylim(max(len(order), 1) - 0.4, -0.6)
    axes.set_xlabel("errors")
    _tidy(axes, grid="x")
    if order:
        axes.legend(frameon=False)
    else:
        _empty(axes, "no errors")
    return figure


def reliability_diagram(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
) -> Figure:
    """Draw which share of confidences proved right: panel -> run -> (confidence, share)."""
    figure = _figure(7.2, 2.9)
    drawn = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axes, (kind, runs) in zip(drawn, panels.items(), strict=False):
        axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle=":")
        for (run, (confidence, right)), colour in zip(runs.items(), itertools.cycle(PALETTE)):
            axes.plot(100 * confidence, 100 * right, "o-", color=colour, ms=4, label=run)
        axes.set(xlabel="confidence [%]", title=kind, xlim=(0, 102), ylim=(0, 102), aspect="equal")
        axes.title.set_fontsize(10)
        _tidy(axes)
        if len(runs) > 1:
            axes.legend(frameon=False, fontsize=8)
    drawn[0].set_ylabel("right [%]")
    return figure


def phoneme_picture(
    logits: np.ndarray,
    label: np.ndarray | None = None,
    title: str = "Phoneme probabilities",
    frame_seconds: float = FRAME_SECONDS,
) -> Figure:
    """Draw class probabilities over time, with decoded phonemes above and true ones beneath.

    Args:
      logits: [P, 41] in the RNN's order, one row per frame.
      label: true class ids [L]. They carry no times, so each stands under its decoded partner of
        the best alignment, and one without partner between its neighbours.
      title: heading, such as the trial's name.
      frame_seconds: from frame to frame.
    """
    logits = check_logits(logits)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    seconds = len(logits) * frame_seconds
    segments = greedy_segments(logits)
    times = [(segment.start + segment.end) / 2 * frame_seconds for segment in segments]
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


FORMATS = ("png", "pdf", "svg")


def rendered(figure: Figure, kind: str) -> bytes:
    """Return the figure as one of FORMATS. Texts of an SVG stay texts, which can be edited."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    steady: Any = {"svg.fonttype": "none", "svg.hashsalt": "b2txt", "pdf.fonttype": 42}
    with matplotlib.rc_context(steady):
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(buffer, format=kind, dpi=_DPI, facecolor="white", metadata=dates.get(kind))
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """Return the figure as `data:` URL of an SVG, for a page that loads nothing."""
    return "data:image/svg+xml;base64," + base64.b64encode(rendered(figure, "svg")).decode()


def save_figure(path: Path, figure: Figure) -> None:
    """Write the figure, whole or not at all. The path's suffix is one of FORMATS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(rendered(figure, path.suffix.removeprefix(".")))


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


def _empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GREY)
