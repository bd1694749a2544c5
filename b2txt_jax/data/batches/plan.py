"""The trials of a training batch, a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from b2txt_jax.errors import UserError

_PLAN_STREAM, _EPOCH_STREAM = 0x706C616E, 0x65706F63
"""Separate these draws from other uses of the same seed."""


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


def epoch_plan(seed: int, step: int, trials_of_day: Sequence[int], rows: int) -> np.ndarray:
    """Return one batch of shuffled epochs: int64 [rows, 2], columns (day, trial of the day).

    The epochs, each a random order of all trials of all days, follow one another without a gap, and
    batches are cut from them. So every trial comes once per epoch, every batch is full, and the
    last batch of an epoch is completed with the first trials of the next one. The same (seed, step)
    gives the same rows on any number of hosts.

    Args:
      seed: of the run.
      step: of the optimizer, from 0.
      trials_of_day: training trials of each day.
      rows: of a batch.

    Raises:
      PlanError: there are no trials.
    """
    ends = np.cumsum(trials_of_day)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise PlanError(
            f"none of the {len(ends)} sessions has training trials; needed some to make batches "
            "of: check data.root and data.sessions"
        )
    epochs, places = np.divmod(np.arange(step * rows, (step + 1) * rows), total)
    trials = np.empty(rows, np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([_EPOCH_STREAM, seed, epoch]).permutation(total)
        trials[epochs == epoch] = order[places[epochs == epoch]]
    days = np.searchsorted(ends, trials, side="right")
    return np.stack([days, trials - (ends - trials_of_day)[days]], axis=1)
