import pytest

from b2txt_jax.signal.smooth import gaussian_taps


def test_a_window_that_cuts_the_kernel_is_refused():
    with pytest.raises(ValueError, match="at least 17"):
        gaussian_taps(2.0, 10)
