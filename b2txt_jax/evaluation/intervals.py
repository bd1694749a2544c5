"""Intervals of error rates, by a bootstrap that draws recording days.

Trials of one day share its electrodes and its day layer, so their errors are not independent. An
interval over trials would be too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from b2txt_jax.metrics import ErrorRate, total_by

DRAWS = 2000
LEVEL = 0.95
LEAST_DAYS = 5
"""Fewer days than this cannot be drawn from. Trials are drawn instead, and the interval says so."""


@dataclass(frozen=True)
class Interval:
    """Percentile interval of a rate (1.0 = 100 %).

    Attributes:
      low, high: its ends.
      unit: what was drawn, "days" or "trials". One of trials lacks the differences between days, so
        it is too narrow.
      units: how many there are.
      days: recording days that the trials are of.
    """

    low: float
    high: float
    unit: str
    units: int
    days: int

    def to_json(self) -> dict[str, Any]:
        """Return all of it with the level and the number of draws."""
        return {**asdict(self), "level": LEVEL, "draws": DRAWS}

    def __str__(self) -> str:
        return f"{100 * self.low:.2f} to {100 * self.high:.2f} %"


def bootstrap_interval(
    days: Sequence[str], rates: Sequence[ErrorRate], draws: int = DRAWS, seed: int = 0
) -> Interval | None:
    """Return the interval of the aggregate rate, between the 2.5th and the 97.5th percentile.

    Each draw takes as many days as there are, with replacement. A drawn day brings all of its
    trials. The rate of a draw is the sum of their errors divided by the sum of their lengths. With
    fewer than LEAST_DAYS days the trials are drawn in the same way, one by one.

    Args:
      days: the recording day of each trial.
      rates: of each trial.
      draws: number of draws. Those that happen to hold no reference are left out.
      seed: of the draws.

    Returns:
      None where there is no rate, or only one unit to draw.
    """
    by_day = list(total_by(days, rates).values())
    drawn, unit = (by_day, "days") if len(by_day) >= LEAST_DAYS else (list(rates), "trials")
    count = len(drawn)
    if count < 2 or not any(rate.length for rate in drawn):
        return None
    errors = np.array([rate.errors for rate in drawn])
    lengths = np.array([rate.length for rate in drawn])
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
    sums = times @ lengths
    found = (times @ errors)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high), unit, count, len(by_day))
