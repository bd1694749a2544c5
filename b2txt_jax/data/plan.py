"""Which trials make up a training batch: a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from b2txt_jax.errors import UserError

_PLAN_STREAM = 0x706C616E
"""Keeps these draws apart from any other use of the same seed."""


class PlanError(UserError, ValueError):
    """The data cannot give the batches that the configuration asks for."""


def plan(
    seed: int, step: int, trials_of_day: Sequence[int], days_per_batch: int, trials_per_day: int
) -> np.ndarray:
    """Draws one batch: int64 [days_per_batch * trials_per_day, 2], columns day index and trial
    index within the day.

    Days are different ones, drawn uniformly among the days with trials; trials are drawn uniformly
    within a day, with replacement (NEJM reference, section 4). The same (seed, step) gives the same
    rows on any number of hosts.

    Args:
      seed: of the run.
      step: of the optimizer, from 0.
      trials_of_day: training trials of each day; days with none are never drawn.
      days_per_batch: different days in the batch.
      trials_per_day: rows per day.

    Raises:
      PlanError: fewer days have trials than a batch needs.
    """
    days = np.flatnonzero(np.asarray(trials_of_day) > 0)
    if len(days) < days_per_batch:
        raise PlanError(
            f"{len(days)} sessions have training trials; a batch needs {days_per_batch} different "
            f"ones: "
            "add sessions or lower data.days_per_batch"
        )
    random = np.random.default_rng([_PLAN_STREAM, seed, step])
    chosen = random.choice(days, size=days_per_batch, replace=False)
    rows = [
        np.stack(
            [
                np.full(trials_per_day, day),
                random.integers(0, trials_of_day[day], size=trials_per_day),
            ],
            axis=1,
        )
        for day in chosen
    ]
    return np.concatenate(rows)
