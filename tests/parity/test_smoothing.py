"""Smoothing against scipy's kernel and torch's depthwise convolution, in float64."""

import jax
import numpy as np
import pytest
import torch
from published import smoothed, taps

from b2txt_jax.signal.smooth import gaussian_taps, smooth

fast_smooth = jax.jit(smooth, static_argnums=(1, 2, 3))


@pytest.mark.parametrize("std", [0.8, 1.0, 2.0, 3.5, 5.0])
def test_taps_are_those_of_the_published_recipe(std):
    np.testing.assert_allclose(gaussian_taps(std, 100), taps(std, 100), rtol=1e-12)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("std", "length"), [(2.0, 40), (2.0, 9), (1.0, 300), (5.0, 60)])
def test_smoothing_and_its_gradient_equal_torch(padding, std, length):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, length, 5))
    mirror = torch.tensor(x, requires_grad=True)
    expected = smoothed(mirror, std, 100, padding)
    with jax.enable_x64(True):
        got = fast_smooth(x, std, 100, padding)
        np.testing.assert_allclose(got, expected.detach(), atol=1e-13)
        weights = rng.normal(size=expected.shape)
        gradient = jax.grad(lambda x: (fast_smooth(x, std, 100, padding) * weights).sum())(x)
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(gradient, mirror.grad, atol=1e-13)


def test_a_trial_shorter_than_the_kernel_is_smoothed_as_torch_does():
    x = np.random.default_rng(1).normal(size=(1, 3, 2)).astype(np.float32)
    expected = smoothed(torch.tensor(x, dtype=torch.float64), 2.0, 100)
    np.testing.assert_allclose(fast_smooth(x, 2.0, 100), expected, atol=1e-6)


def test_smoothing_a_padded_batch_equals_smoothing_the_trial_alone():
    trial = np.random.default_rng(2).normal(size=(1, 50, 3)).astype(np.float32)
    padded = np.pad(trial, ((0, 0), (0, 70), (0, 0)))
    expected = smoothed(torch.tensor(trial, dtype=torch.float64), 2.0, 100)
    np.testing.assert_allclose(fast_smooth(padded, 2.0, 100)[:, :50], expected, atol=1e-6)
