"""Lays the trials of a training batch out in rows: several short trials share a row.

Without it, every row is as long as the longest trial of the batch, and most of it is padding. The
trials that a batch has are those of the plan. The layout is a function of their lengths alone, so
that all hosts make the same one.

A trial begins at a multiple of the model's stride, so that its frames are those of the trial alone.
Zeros between two trials are as many as smoothing reaches. Trials of one row are of one day where
each day has an input layer, which then is one product a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

MULTIPLE = 16
"""Bins and labels of a shape are rounded up to this."""
SHAPES = 3
"""Of packed batches, at most, besides a spare one for the few batches that need more rows than any
of the sample. Each is one compilation."""
MOST_SEGMENTS = 16
"""Trials in a row, at most."""
_SAVES = 0.015
"""Share of the work that another shape must save, at least."""
_SPARE = 1.1
"""Times the rows that the largest of a sample of batches needs, for the others."""
_ROWS_OF_LENGTH = 2.0
"""A bin more in every row costs as so many more rows on each device: a recurrence takes its time
frame by frame, however few its rows are."""


@dataclass(frozen=True)
class Shape:
    """A static shape of batches."""

    rows: int
    bins: int
    """Of 20 ms per row."""
    labels: int
    """Per trial."""
    segments: int = 0
    """Trials in a row, at most. 0: one trial a row, not packed."""
    trials: int = 0
    """Trials in the rows of one group, at most, if packed."""

    @property
    def bucket(self) -> tuple[int, int]:
        """Bins of a row and labels of a trial."""
        return self.bins, self.labels

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.bins} x {self.labels}"


@dataclass(frozen=True)
class Rules:
    """What a layout must obey."""

    stride: int
    """Bins from frame to frame: where a trial may begin."""
    gap: int
    """Zero bins between two trials, at least."""
    one_day: bool
    """Whether the trials of a row must be of one day."""
    groups: int = 1
    """Devices that the rows are divided over evenly, in order."""

    @property
    def multiple(self) -> int:
        """That the bins of a row are rounded up to."""
        return math.lcm(MULTIPLE, self.stride)


@dataclass(frozen=True)
class Layout:
    """Where the trials of a batch are."""

    shape: Shape
    trial: np.ndarray
    """int32 [R, S], number of a trial in the batch, by row. -1 for none."""
    start: np.ndarray
    """int32 [R, S], its first bin. The bins of the row for none."""
    slot: np.ndarray
    """int32 [G, N], places of the trials of each group in its part of `trial`, flat. -1 for
    none."""


def fill_rows(sizes: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """Return rows of indices of `sizes`, each with at most `capacity` and `most` members: the
    longest first, each into the fullest row that it fits ("best fit decreasing")."""
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [r for r, room in enumerate(left) if room >= sizes[index] and len(rows[r]) < most]
        if fits:
            row = min(fits, key=left.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            left.append(capacity)
        rows[row].append(index)
        left[row] -= sizes[index]
    return rows


def _sizes(bins: Sequence[int], rules: Rules) -> list[int]:
    """Return the bins that trials take up, with the zeros behind them."""
    return [-(-(length + rules.gap) // rules.stride) * rules.stride for length in bins]


def _shared(
    bins: Sequence[int], days: Sequence[int], length: int, most: int, rules: Rules
) -> list[list[int]]:
    """Return rows of trials."""
    sizes = _sizes(bins, rules)
    parts: list[list[int]] = [list(range(len(bins)))]
    if rules.one_day:
        parts = [[i for i, day in enumerate(days) if day == one] for one in dict.fromkeys(days)]
    return [
        [part[i] for i in row]
        for part in parts
        # The zeros behind the last trial of a row may be missing.
        for row in fill_rows([sizes[i] for i in part], length + rules.gap, most)
    ]


def _grouped(rows: list[list[int]], count: int, groups: int) -> list[list[list[int]]]:
    """Divide rows and empty ones, `count` in all, into groups of as many rows and about as many
    trials."""
    divided: list[list[list[int]]] = [[] for _ in range(groups)]
    filled = rows + [[] for _ in range(count - len(rows))]
    for row in sorted(filled, key=len, reverse=True):
        open_ = [group for group in divided if len(group) < count // groups]
        min(open_, key=lambda group: sum(map(len, group))).append(row)
    return divided


def lay_out(bins: Sequence[int], days: Sequence[int], shape: Shape, rules: Rules) -> Layout | None:
    """Lay trials out in rows of a packed shape. None where they do not fit.

    Args:
      bins: of each trial of the batch.
      days: of each trial.
      shape: with segments.
      rules: of layouts.
    """
    if max(bins) > shape.bins:
        return None
    rows = _shared(bins, days, shape.bins, shape.segments, rules)
    if len(rows) > shape.rows:
        return None
    groups = _grouped(rows, shape.rows, rules.groups)
    if max(sum(map(len, group)) for group in groups) > shape.trials:
        return None
    sizes = _sizes(bins, rules)
    trial = np.full((shape.rows, shape.segments), -1, np.int32)
    start = np.full((shape.rows, shape.segments), shape.bins, np.int32)
    slot = np.full((rules.groups, shape.trials), -1, np.int32)
    per_group = shape.rows // rules.groups
    for g, group in enumerate(groups):
        taken = 0
        for r, row in enumerate(group):
            at = 0
            for s, index in enumerate(row):
                trial[g * per_group + r, s], start[g * per_group + r, s] = index, at
                slot[g, taken] = r * shape.segments + s
                at += sizes[index]
                taken += 1
    return Layout(shape, trial, start, slot)


def needed_shape(bins: Sequence[int], days: Sequence[int], shape: Shape, rules: Rules) -> Shape:
    """Return `shape` with more rows or trials, or longer rows, so that these trials fit."""
    length = max(shape.bins, -(-max(bins) // rules.multiple) * rules.multiple)
    rows = _shared(bins, days, length, shape.segments, rules)
    count = max(shape.rows, -(-len(rows) // rules.groups) * rules.groups)
    most = max(sum(map(len, group)) for group in _grouped(rows, count, rules.groups))
    return replace(shape, rows=count, bins=length, trials=max(shape.trials, most))


def work(shape: Shape, groups: int) -> float:
    """Return what a step with a shape costs, in bins of one row of each device."""
    return shape.bins * (shape.rows / groups + _ROWS_OF_LENGTH)


def choose_shapes(
    batches: Sequence[tuple[Sequence[int], Sequence[int]]],
    labels: int,
    rules: Rules,
    others: int = 0,
    saves: float = 0,
) -> tuple[Shape, ...]:
    """Return the shapes with which these batches cost least, cheapest first. The last holds all.

    Args:
      batches: bins and days of the trials of each: a sample of what training draws.
      labels: of the longest label.
      rules: of layouts.
      others: bins of the longest trial, where there are other batches. 0: there are none.
      saves: share of the work that another shape must save, 0.015 at least.
    """
    labels = -(-max(labels, 1) // MULTIPLE) * MULTIPLE
    longest = np.sort([max(bins) for bins, _ in batches])
    wanted = [longest[len(longest) // 2], longest[int(0.9 * len(longest))]]
    wanted += [longest[-1] * factor for factor in (1, 1.05, 1.1, 1.2, 1.35, 1.5, 2)]
    lengths = sorted({int(-(-length // rules.multiple) * rules.multiple) for length in wanted})
    options: list[tuple[Shape, np.ndarray]] = []
    for length in lengths:
        # Of each batch that fits: its rows, the most trials in a row, and in a group.
        needs = np.full((len(batches), 3), -1)
        for need, (bins, days) in zip(needs, batches, strict=True):
            if max(bins) <= length:
                rows = _shared(bins, days, length, MOST_SEGMENTS, rules)
                count = -(-len(rows) // rules.groups) * rules.groups
                groups = _grouped(rows, count, rules.groups)
                need[:] = count, max(map(len, rows)), max(sum(map(len, one)) for one in groups)
        for count in np.unique(needs[needs[:, 0] > 0, 0]):
            fits = (needs[:, 0] > 0) & (needs[:, 0] <= count)
            segments, trials = (int(most) for most in needs[fits, 1:].max(0))
            if rules.groups > 1:
                trials += 1  # other batches are less even
            options.append((Shape(int(count), length, labels, segments, trials), fits))
    cost = np.array([work(shape, rules.groups) for shape, _ in options])
    fitting = np.array([fits for _, fits in options])

    def expected(chosen: Iterable[int]) -> float:
        chosen = list(chosen)
        return float(np.where(fitting[chosen], cost[chosen, None], np.inf).min(0).mean())

    all_fit = (i for i in range(len(options)) if fitting[i].all())
    chosen = [min(all_fit, key=lambda i: cost[i])]
    while len(chosen) < SHAPES:
        more = min(range(len(options)), key=lambda i: expected([*chosen, i]))
        if expected([*chosen, more]) > (1 - max(saves, _SAVES)) * expected(chosen):
            break
        chosen.append(more)
    shapes = [options[i][0] for i in sorted(chosen, key=lambda i: cost[i])]
    if others:
        largest = options[chosen[0]][0]
        spare = replace(
            largest,
            rows=-(-math.ceil(_SPARE * largest.rows) // rules.groups) * rules.groups,
            bins=-(-max(others, largest.bins) // rules.multiple) * rules.multiple,
            segments=largest.segments + 1,
        )
        shapes.append(spare)
    return tuple(shapes)
