import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from b2txt_jax.signal.smooth import gaussian_taps, smooth


def published_taps(std, size):
    """The published recipe: filter an impulse with scipy, keep taps above 0.01, renormalise."""
    impulse = np.zeros(size, np.float64)
    impulse[size // 2] = 1
    response = gaussian_filter1d(impulse, std)
    kept = response[response > 0.01]
    return kept / kept.sum()


@pytest.mark.parametrize("std", [1.0, 2.0, 3.5])
def test_taps_are_those_of_the_published_recipe(std):
    np.testing.assert_allclose(gaussian_taps(std, 100), published_taps(std, 100), rtol=1e-12)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_smoothing_equals_torch_convolution(padding):
    x = np.random.default_rng(0).normal(size=(3, 40, 5))
    taps = torch.tensor(published_taps(2.0, 100)).view(1, 1, -1).repeat(5, 1, 1)
    expected = torch.nn.functional.conv1d(
        torch.tensor(x).permute(0, 2, 1), taps, padding=padding, groups=5
    ).permute(0, 2, 1)
    np.testing.assert_allclose(smooth(jnp.asarray(x), 2.0, 100, padding), expected, atol=1e-6)


def test_a_window_that_cuts_the_kernel_is_refused():
    with pytest.raises(ValueError, match="at least 17"):
        gaussian_taps(2.0, 10)
