"""The trials of a training batch, a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from b2txt_jax.errors import UserError

_PLAN_STREAM = 0x706C616E
"""Separates these draws from other uses of the same seed."""


class PlanError(UserError, ValueError):
    """The data cannot fill the batches of the configuration."""


def plan(
    seed: int, step: int, trials_of_day: Sequence[int], days_per_batch: int, trials_per_day: int
) -> np.ndarray:
    """Draw one batch: int64 [days_per_batch * trials_per_day, 2], columns (day, trial of the day).

    Different days are drawn uniformly among those with trials. Trials are drawn uniformly within a
    day, with replacement (NEJM reference, section 4). The same (seed, step) draws the same rows on
    any number of hosts.

    Args:
      seed: of the run.
      step: of the optimizer, from 0.
      trials_of_day: training trials of each day. Days with none are never drawn.
      days_per_batch: different days in the batch.
      trials_per_day: rows per day.

    Raises:
      PlanError: fewer days have trials than a batch needs.
    """
    days = np.flatnonzero(np.asarray(trials_of_day) > 0)
    if len(days) < days_per_batch:
        raise PlanError(
            f"{len(days)} sessions have training trials; a batch needs {days_per_batch} different "
            "ones: add sessions or lower data.days_per_batch"
        )
    random = np.random.default_rng([_PLAN_STREAM, seed, step])
    chosen = random.choice(days, size=days_per_batch, replace=False)
    trials = [random.integers(0, trials_of_day[day], size=trials_per_day) for day in chosen]
    return np.stack([np.repeat(chosen, trials_per_day), np.concatenate(trials)], axis=1)
