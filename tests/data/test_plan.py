from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2txt_jax.data.batches.plan import PlanError, epoch_plan, plan


@given(
    st.integers(0, 2**31),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 50), min_size=1, max_size=50),
    st.integers(1, 6),
    st.integers(1, 20),
)
def test_a_batch_has_its_days_and_trials_and_only_trials_that_are_there(
    seed, step, trials_of_day, days_per_batch, trials_per_day
):
    if sum(count > 0 for count in trials_of_day) < days_per_batch:
        with pytest.raises(PlanError, match=r"lower data\.days_per_batch"):
            plan(seed, step, trials_of_day, days_per_batch, trials_per_day)
        return
    rows = plan(seed, step, trials_of_day, days_per_batch, trials_per_day)
    assert Counter(Counter(rows[:, 0].tolist()).values()) == {trials_per_day: days_per_batch}
    assert all(0 <= trial < trials_of_day[day] for day, trial in rows)
    np.testing.assert_array_equal(
        rows, plan(seed, step, trials_of_day, days_per_batch, trials_per_day)
    )


def test_other_seeds_and_steps_give_other_batches():
    batches = {plan(s, t, [50] * 9, 4, 16).tobytes() for s in range(5) for t in range(20)}
    assert len(batches) == 100


def test_days_are_drawn_uniformly_whatever_their_number_of_trials():
    counts = Counter()
    for step in range(3000):
        counts.update(set(plan(1, step, [3, 500, 40, 7, 90], 2, 4)[:, 0].tolist()))
    shares = np.array([counts[day] for day in range(5)]) / 6000
    np.testing.assert_allclose(shares, 0.2, atol=0.02)


def test_trials_are_drawn_with_replacement():
    rows = plan(0, 0, [3], 1, 64)
    assert set(rows[:, 1].tolist()) == {0, 1, 2}


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(0, 40),
)
def test_every_trial_comes_once_per_epoch_and_every_batch_is_full(
    seed, trials_of_day, rows, first_epoch
):
    everything = [(day, i) for day, count in enumerate(trials_of_day) for i in range(count)]
    total = len(everything)
    if not total:
        with pytest.raises(PlanError, match="needed some to make batches of"):
            epoch_plan(seed, 0, trials_of_day, rows)
        return
    # From the first batch with a trial of the epoch to the last one.
    start = first_epoch * total
    steps = range(start // rows, -(-(start + total) // rows))
    batches = [epoch_plan(seed, step, trials_of_day, rows) for step in steps]
    assert {batch.shape for batch in batches} == {(rows, 2)}
    stream = np.concatenate(batches)[start - steps[0] * rows :][:total]
    assert sorted(map(tuple, stream.tolist())) == everything


def test_epochs_are_shuffled_over_all_days_and_differ_by_seed_and_epoch():
    orders = {epoch_plan(s, e, [30] * 4, 120).tobytes() for s in range(5) for e in range(20)}
    assert len(orders) == 100
    first = np.zeros((4, 4))  # day at each of the first places: uniform
    for seed in range(2000):
        days = epoch_plan(seed, 0, [30] * 4, 4)[:, 0]
        first[np.arange(4), days] += 1
    np.testing.assert_allclose(first / 2000, 0.25, atol=0.05)


def test_a_batch_of_an_epoch_does_not_depend_on_the_batches_before():
    """Resuming and reading ahead ask for steps in any order."""
    wanted = {step: epoch_plan(3, step, [5, 0, 8], 4) for step in range(30)}
    for step in np.random.default_rng(0).permutation(30):
        np.testing.assert_array_equal(epoch_plan(3, int(step), [5, 0, 8], 4), wanted[step])
