import pytest

from b2txt_jax.config import ConfigError
from b2txt_jax.signal.smooth import gaussian_taps


def test_a_window_that_cuts_the_kernel_is_refused():
    with pytest.raises(ConfigError, match="at least 17"):
        gaussian_taps(2.0, 10)


def test_a_kernel_so_wide_that_all_taps_would_be_dropped_is_refused():
    with pytest.raises(ConfigError, match="needed less than 39"):
        gaussian_taps(60.0, 1000)
