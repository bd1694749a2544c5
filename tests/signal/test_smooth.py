import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from b2txt_jax.config import ConfigError, load_config
from b2txt_jax.signal.smooth import gaussian_taps, smooth, smooth_as, taps_of


def test_a_window_that_cuts_the_kernel_is_refused():
    with pytest.raises(ConfigError, match="at least 17"):
        gaussian_taps(2.0, 10)


def test_a_kernel_so_wide_that_all_taps_would_be_dropped_is_refused():
    with pytest.raises(ConfigError, match="needed less than 39"):
        gaussian_taps(60.0, 1000)


def test_the_one_sided_kernel_is_the_published_one_and_never_looks_ahead():
    signal = dataclasses.replace(load_config("demo").signal, smooth_kernel="one_sided")
    taps, ahead = taps_of(signal)
    np.testing.assert_allclose(taps, [0.046, 0.110, 0.206, 0.299, 0.339], atol=5e-4)
    impulse = jnp.zeros((1, 20, 1)).at[0, 10].set(1.0)
    smoothed = np.asarray(smooth_as(impulse, signal))[0, :, 0]
    assert ahead == 0
    assert not smoothed[:10].any()
    np.testing.assert_allclose(smoothed[10:15], taps[::-1], rtol=1e-6)
    symmetric = dataclasses.replace(signal, smooth_kernel="symmetric")
    assert taps_of(symmetric)[1] == 4
    np.testing.assert_array_equal(smooth_as(impulse, symmetric), smooth(impulse, 2.0, 100))
