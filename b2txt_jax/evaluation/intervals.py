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
    drawn = _drawn(days, [rates], draws, seed)
    if drawn is None:
        return None
    low, high = _ends(drawn.rates[0])
    return Interval(low, high, drawn.unit, drawn.units, drawn.days)


@dataclass(frozen=True)
class Paired:
    """The difference of two rates over the same trials, the second minus the first.

    Attributes:
      interval: of the difference, from draws that take the same days for both.
      p: twice the share of draws on the other side of 0, at least 1 / draws: the probability of
        such a difference if there were none.
    """

    interval: Interval
    p: float


def paired_bootstrap(
    days: Sequence[str],
    first: Sequence[ErrorRate],
    second: Sequence[ErrorRate],
    draws: int = DRAWS,
    seed: int = 0,
) -> Paired | None:
    """Compare two systems on the same trials. Draws are those of `bootstrap_interval`.

    Returns:
      None where there is no rate, or only one unit to draw.
    """
    drawn = _drawn(days, [first, second], draws, seed)
    if drawn is None:
        return None
    difference = drawn.rates[1] - drawn.rates[0]
    sides = min((difference <= 0).mean(), (difference >= 0).mean())
    interval = Interval(*_ends(difference), drawn.unit, drawn.units, drawn.days)
    return Paired(interval, float(np.clip(2 * sides, 1 / draws, 1.0)))


@dataclass(frozen=True)
class _Drawn:
    rates: np.ndarray
    """[systems, draws]."""
    unit: str
    units: int
    days: int


def _drawn(
    days: Sequence[str], systems: Sequence[Sequence[ErrorRate]], draws: int, seed: int
) -> _Drawn | None:
    by_day = [list(total_by(days, rates).values()) for rates in systems]
    whole = len(by_day[0]) >= LEAST_DAYS
    drawn = by_day if whole else systems
    count = len(drawn[0])
    errors = np.array([[rate.errors for rate in rates] for rates in drawn])
    lengths = np.array([[rate.length for rate in rates] for rates in drawn])
    if count < 2 or not lengths.any(1).all():
        return None
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
    sums = lengths @ times.T
    known = (sums > 0).all(0)
    rates = (errors @ times.T)[:, known] / sums[:, known]
    return _Drawn(rates, "days" if whole else "trials", count, len(by_day[0]))


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
