"""Which static shapes the batches of a run have, and how often, by the lengths of its trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from b2txt_jax.config import DataConfig
from b2txt_jax.data.batches.layout import (
    Layout,
    Rules,
    Shape,
    choose_shapes,
    lay_out,
    needed_shape,
    work,
)
from b2txt_jax.data.batches.plan import epoch_plan, plan

SAMPLE = 200
"""Steps, from the first, whose batches are looked at."""
_SHORT_RUN = 1000
"""Steps of a run up to which all batches are looked at, so that it needs no shape to spare."""
_COMPILATION = 50
"""Steps of a short run that take as long as the compilation of a further shape."""
_PAYS = 0.9
"""Share of the work of one trial a row that packing must get by with, to be chosen."""


@dataclass(frozen=True)
class Shapes:
    """Shapes of a run's batches."""

    share: dict[Shape, float]
    """Shape -> share of the batches, in the sample. 0.0: kept for batches outside the sample."""
    rules: Rules | None
    """How trials share rows. None: they do not."""

    @property
    def computed(self) -> float:
        """Expected bins of a batch, with padding."""
        return sum(share * shape.rows * shape.bins for shape, share in self.share.items())

    def lay_out(self, bins: Sequence[int], days: Sequence[int]) -> Layout:
        """Lay trials out in the first shape that they fit, or else in one that is made for them."""
        assert self.rules is not None
        for shape in self.share:
            layout = lay_out(bins, days, shape, self.rules)
            if layout is not None:
                return layout
        largest = list(self.share)[-1]
        shape = needed_shape(bins, days, largest, self.rules)
        layout = lay_out(bins, days, shape, self.rules)
        assert layout is not None
        return layout


def drawn_trials(data: DataConfig, counts: Sequence[int], seed: int, step: int) -> np.ndarray:
    """Return the (day, trial of the day) rows of a batch, by the configured plan.

    Raises:
      PlanError: the days cannot fill a batch.
    """
    if data.plan == "epochs":
        return epoch_plan(seed, step, counts, data.batch_rows)
    return plan(seed, step, counts, data.days_per_batch, data.trials_per_day)


def choose(
    data: DataConfig,
    buckets: Sequence[tuple[int, int]],
    lengths: Sequence[Sequence[tuple[int, int]]],
    rules: Rules | None,
    seed: int,
    steps: int,
) -> Shapes:
    """Return the shapes of a run's batches, and whether trials share rows in them.

    Args:
      data: how batches are drawn, and `packing`.
      buckets: (bins, labels), ascending. The last holds every trial.
      lengths: (bins, labels) of each day's training trials.
      rules: how trials may share rows. None: they may not.
      seed: of the run.
      steps: of the run.

    Raises:
      PlanError: the days cannot fill a batch.
    """
    counts, seen = [len(day) for day in lengths], steps if steps <= _SHORT_RUN else SAMPLE
    drawn = [drawn_trials(data, counts, seed, step) for step in range(seen)]
    of_batch = [[lengths[day][trial] for day, trial in rows] for rows in drawn]
    every = [length for day in lengths for length in day]
    found = [_bucket(batch, buckets) for batch in of_batch]
    if steps > seen:
        found.append(_bucket(every, buckets))
    whole = Shapes(
        {
            Shape(data.batch_rows, *bucket): found[:seen].count(bucket) / seen
            for bucket in sorted(set(found))
        },
        None,
    )
    if rules is None:
        return whole
    batches = [
        ([bins for bins, _ in batch], [int(day) for day, _ in rows])
        for batch, rows in zip(of_batch, drawn, strict=True)
    ]
    others = max(bins for bins, _ in every) if steps > seen else 0
    longest_label = max(labels for _, labels in every)
    shapes = choose_shapes(batches, longest_label, rules, others, _COMPILATION / steps)
    share = dict.fromkeys(shapes, 0.0)
    packed = Shapes(share, rules)
    for bins, days in batches:
        share[packed.lay_out(bins, days).shape] += 1 / seen
    pays = _cost(packed, rules.groups, steps) <= _PAYS * _cost(whole, rules.groups, steps)
    return packed if pays or data.packing == "on" else whole


def _cost(shapes: Shapes, groups: int, steps: int) -> float:
    """Return what a step costs, with its part of the compilations."""
    step = sum(share * work(shape, groups) for shape, share in shapes.share.items())
    return step * (1 + len(shapes.share) * _COMPILATION / steps)


def _bucket(
    lengths: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Return the first bucket that holds all of these trials."""
    bins, labels = (max(one) for one in zip(*lengths, strict=True))
    return next(bucket for bucket in buckets if bins <= bucket[0] and labels <= bucket[1])
