from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2txt_jax.data.plan import PlanError, plan


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
