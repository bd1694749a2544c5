"""Bootstrap intervals against enumeration of every draw and against scipy."""

import itertools

import numpy as np
import pytest
import scipy.stats

from b2txt_jax.evaluation.intervals import Interval, bootstrap_interval
from b2txt_jax.metrics import ErrorRate

DAYS = [f"day{n}" for n in range(5)]
ERRORS, LENGTHS = np.array([1, 9, 4, 30, 2]), np.array([20, 30, 10, 60, 50])


def trials_of(errors: np.ndarray, lengths: np.ndarray, parts: int) -> tuple[list, list]:
    """Trials of each day whose sums are these: all errors and most words are in the first."""
    days, rates = [], []
    for day, wrong, length in zip(DAYS, errors, lengths, strict=False):
        for part in range(parts):
            days.append(day)
            rest = int(length) - (parts - 1)
            rates.append(ErrorRate(int(wrong), rest) if part == 0 else ErrorRate(0, 1))
    return days, rates


def test_every_draw_of_days_with_replacement_gives_the_percentiles() -> None:
    draws = [
        list(one) for one in itertools.product(range(5), repeat=5)
    ]  # all 3,125, equally likely
    exact = [ERRORS[one].sum() / LENGTHS[one].sum() for one in draws]
    found = bootstrap_interval(*trials_of(ERRORS, LENGTHS, 3), draws=200_000)
    assert found is not None
    assert (found.unit, found.units, found.days) == ("days", 5, 5)
    assert [found.low, found.high] == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=0.004)


def test_scipy_s_bootstrap_of_the_sums_of_days_has_the_same_ends() -> None:
    def rate(errors: np.ndarray, lengths: np.ndarray, axis: int) -> np.ndarray:
        return errors.sum(axis) / lengths.sum(axis)

    rng = np.random.default_rng(1)
    errors, lengths = rng.integers(0, 30, 40), rng.integers(100, 200, 40)
    theirs = scipy.stats.bootstrap(
        (errors, lengths), rate, paired=True, method="percentile", n_resamples=50_000, rng=2
    ).confidence_interval
    days = [f"day{n}" for n in range(40)]
    rates = [ErrorRate(int(e), int(n)) for e, n in zip(errors, lengths, strict=True)]
    ours = bootstrap_interval(days, rates, draws=50_000)
    assert ours is not None
    assert [ours.low, ours.high] == pytest.approx(theirs, abs=1e-3)


def test_trials_of_a_day_that_err_together_widen_the_interval() -> None:
    """Twenty trials of a day that are all alike count as one, not as twenty."""
    days = [day for day in DAYS for _ in range(20)]
    same = [ErrorRate(10 * (n // 40), 100) for n in range(100)]
    spread = [ErrorRate(10 * (n % 20 // 7), 100) for n in range(100)]
    by_day, mixed = bootstrap_interval(days, same), bootstrap_interval(days, spread)
    assert by_day is not None
    assert mixed is not None
    assert by_day.high - by_day.low > 0.1
    assert mixed.high - mixed.low == pytest.approx(0.0)


def test_fewer_than_five_days_draw_trials_and_say_so() -> None:
    days, rates = trials_of(ERRORS[:4], LENGTHS[:4], 3)
    found = bootstrap_interval(days, rates, draws=50_000)
    # Two trials, 1 of 2 and 0 of 2 words wrong: a quarter of the draws each is 0 and 1/2.
    two = bootstrap_interval(["day", "day"], [ErrorRate(1, 2), ErrorRate(0, 2)])
    assert found is not None
    assert (found.unit, found.units, found.days) == ("trials", 12, 4)
    assert two == Interval(0.0, 0.5, "trials", 2, 1)


def test_the_same_seed_draws_the_same() -> None:
    given = trials_of(ERRORS, LENGTHS, 2)
    assert bootstrap_interval(*given) == bootstrap_interval(*given)
    assert bootstrap_interval(*given, draws=30) != bootstrap_interval(*given, draws=30, seed=1)


@pytest.mark.parametrize("rates", [[], [ErrorRate(1, 2)], [ErrorRate(1, 0), ErrorRate(0, 0)]])
def test_too_little_to_draw_from_has_no_interval(rates: list[ErrorRate]) -> None:
    assert bootstrap_interval(["day"] * len(rates), rates) is None


def test_draws_without_a_reference_are_left_out() -> None:
    found = bootstrap_interval(["day"] * 2, [ErrorRate(1, 4), ErrorRate(1, 0)])
    assert found is not None
    assert (found.low, found.high) == (0.25, 0.5)
