"""What the bar of a training shows."""

import pytest

from b2txt_jax.training.tracker import time_left


@pytest.mark.parametrize(
    ("validations", "seconds", "shown"),
    [(3, None, ">1:00:00"), (3, 60.4, "1:03:01"), (0, None, "1:00:00")],
)
def test_time_left_counts_validations_and_states_when_their_time_is_unknown(
    validations, seconds, shown
):
    assert time_left(3600.0, validations, seconds) == shown
