"""Draw the figures of the published paper, from the published files and from own runs.

--copy-task draws Figure 2: raw phoneme error rate and word error rate of each session with 95 %
intervals, by vocabulary, and the logits of a sentence. --personal-use draws Figure 4: hours and
sentences, correctness, words per minute. RUN draws Figure 2 of the newest results of runs. The
files are read without running what is in them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from b2txt_jax.evaluation.figures import (
    BLUE,
    FORMATS,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    Point,
    phoneme_picture,
    rates_by_group,
    save_figure,
)
from b2txt_jax.evaluation.intervals import bootstrap_interval
from b2txt_jax.evaluation.published import (
    CopyTask,
    PersonalUse,
    PublishedDataError,
    read_copy_task,
    read_personal_use,
)
from b2txt_jax.evaluation.report.inputs import groups
from b2txt_jax.evaluation.results import result_of
from b2txt_jax.metrics import ErrorRate, error_rate, total
from b2txt_jax.phonemes import PHONEME_IDS, SILENCE_ID
from lm_server.files.atomic_file import require_writable

_RATINGS = {
    "correct": ("correct",),
    "mostly correct": ("mostly correct", "one word wrong"),
    "incorrect": ("incorrect",),
    "blank trial": ("blank trial",),
    "no rating": ("response timeout", "no user rating"),
}
"""What is drawn -> what the person chose."""
_TRIAL = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt figures`."""
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="evaluated run")
    parser.add_argument("--copy-task", type=Path, metavar="FILE", help="t15_copyTask.pkl")
    parser.add_argument("--personal-use", type=Path, metavar="FILE", help="t15_personalUse.pkl")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        help="one or more (default png)",
    )
    parser.add_argument(
        "--trial",
        type=int,
        help=f"sentence of --copy-task whose logits are drawn (default {_TRIAL})",
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt figures`."""
    if not (args.runs or args.copy_task or args.personal_use):
        raise PublishedDataError("nothing to draw; needed --copy-task, --personal-use or RUN")
    if args.trial is not None and not args.copy_task:
        raise PublishedDataError(
            f"--trial {args.trial} is a sentence of --copy-task; needed both, or neither"
        )
    require_writable(args.out / "figure_2.png", inputs=[*args.runs])
    figures: dict[str, Figure] = {}
    if args.copy_task:
        task = read_copy_task(args.copy_task)
        figures["figure_2_rates"] = session_rates(task)
        trial = _TRIAL if args.trial is None else args.trial
        figures["figure_2_logits"] = example_logits(task, trial)
    if args.personal_use:
        figures["figure_4"] = personal_use(read_personal_use(args.personal_use))
    if args.runs:
        figures["runs_rates"] = run_rates(args.runs)
    for name, figure in figures.items():
        for kind in args.format or FORMATS[:1]:
            save_figure(args.out / f"{name}.{kind}", figure)
            print(args.out / f"{name}.{kind}")
    return 0


def session_rates(task: CopyTask) -> Figure:
    """Draw both error rates of each session. As published, silences count as phonemes, and words
    are compared as they stand in the file."""
    phonemes = [
        error_rate(true, found)
        for true, found in zip(task.cue_phonemes, task.decoded_phonemes, strict=True)
    ]
    words = [
        error_rate(true.split(), found.split())
        for true, found in zip(task.cue, task.decoded, strict=True)
    ]
    panels: dict[str, dict[str, dict[str, Point]]] = {}
    for kind, rates in (("raw phoneme error rate", phonemes), ("word error rate", words)):
        for size in sorted({int(one) for one in task.vocabulary}):
            for day in sorted({int(one) for one in task.day}):
                here = np.flatnonzero((task.day == day) & (task.vocabulary == size))
                if len(here):
                    points = panels.setdefault(kind, {}).setdefault(f"{size:,} words", {})
                    points[f"day {day}"] = _point([rates[n] for n in here])
    days = {f"day {day}": Point(None) for day in sorted({int(one) for one in task.day})}
    ordered = {
        kind: {size: {**days, **points} for size, points in sizes.items()}
        for kind, sizes in panels.items()
    }
    return rates_by_group("Copy task, by days after the implantation", ordered)


def _point(rates: Sequence[ErrorRate]) -> Point:
    interval = bootstrap_interval(["one"] * len(rates), rates)
    ends = (interval.low, interval.high) if interval else (None, None)
    return Point(total(rates).rate, *ends)


def example_logits(task: CopyTask, trial: int) -> Figure:
    """Draw the probabilities of one sentence, with its decoded and true phonemes.

    Raises:
      PublishedDataError: there is no such sentence, or it has an unknown phoneme.
    """
    if not 0 <= trial < len(task.cue):
        raise PublishedDataError(
            f"--trial is {trial}; needed one of 0 to {len(task.cue) - 1}, the sentences of the file"
        )
    names = {**PHONEME_IDS, "SIL": SILENCE_ID, "|": SILENCE_ID}
    unknown = [name for name in task.cue_phonemes[trial] if name not in names]
    if unknown:
        raise PublishedDataError(
            f"sentence {trial} has the phoneme {unknown[0]!r}; needed one of {', '.join(names)}"
        )
    label = np.array([names[name] for name in task.cue_phonemes[trial]], np.int32)
    title = f"day {task.day[trial]}: {task.cue[trial]}"
    return phoneme_picture(task.logits[trial], label, title)


def personal_use(use: PersonalUse) -> Figure:
    """Draw hours and sentences, both added up, then correctness and words per minute by day."""
    figure = Figure(figsize=(7.2, 8.4), layout="constrained")
    hours, sentences, right, speed = figure.subplots(4, 1, sharex=True, height_ratios=[1, 1, 2, 1])
    used = list(use.hours)
    hours.plot(used, np.cumsum(list(use.hours.values())), ".-", color=BLUE)
    sentences.plot(used, np.cumsum(list(use.sentences.values())), ".-", color=ORANGE)
    days = sorted({int(day) for day in use.day})
    ratings = np.array([one.lower() for one in use.rating])
    colours = (GREEN, PALETTE[4], ORANGE, GREY, PALETTE[5])
    for (name, chosen), colour in zip(_RATINGS.items(), colours, strict=True):
        shares = [100 * np.isin(ratings[use.day == day], chosen).mean() for day in days]
        right.plot(days, shares, ".-", color=colour, label=name, linewidth=1)
    known = [(d, w) for d in days if np.isfinite(w := _mean(use.words_per_minute[use.day == d]))]
    speed.plot([day for day, _ in known], [words for _, words in known], ".-", color=GREY)
    hours.set(ylabel="hours", title=f"{sum(use.hours.values()):.0f} hours of use")
    sentences.set(ylabel="sentences", title=f"{sum(use.sentences.values()):,} sentences")
    other = {*ratings} - {one for chosen in _RATINGS.values() for one in chosen}
    title = f"correctness of {len(ratings):,} rated sentences"
    right.set(ylabel="sentences [%]", title=title, ylim=(0, 100))
    if other:
        right.set_title(f"{title} (other ratings: {', '.join(sorted(other))})")
    speed.set(ylabel="words per minute", xlabel="days after the implantation")
    right.legend(frameon=False, fontsize=8)
    for axes in (hours, sentences, right, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
        axes.title.set_fontsize(10)
    for axes in (hours, sentences, speed):
        axes.set_ylim(bottom=0)
    return figure


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def run_rates(runs: Sequence[Path]) -> Figure:
    """Draw both error rates of each session of the newest results of runs.

    Raises:
      ResultsError: a run has no result.
    """
    panels: dict[str, dict[str, dict[str, Point]]] = {}
    for folder in runs:
        for one in groups(result_of(folder).trials).get("recording day", []):
            for kind, rate, interval in (
                ("phoneme error rate", one.per, one.per_interval),
                ("word error rate", one.wer, one.wer_interval),
            ):
                if rate is not None:
                    ends = (interval.low, interval.high) if interval else (None, None)
                    points = panels.setdefault(kind, {}).setdefault(str(folder), {})
                    points[one.name] = Point(rate.rate, *ends)
    if not panels:
        raise PublishedDataError(f"the results of {runs[0]} have no error rates of each trial")
    return rates_by_group("Error rates by recording day", panels)
