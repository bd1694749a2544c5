import jax
import numpy as np
import pytest

from b2txt_jax.model.dropout import dropout


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_dropout_zeroes_the_stated_share_and_keeps_the_mean(rate):
    dropped = np.asarray(dropout(jax.numpy.ones((200, 500)), rate, jax.random.key(0)))
    assert (dropped == 0).mean() == pytest.approx(rate, abs=0.01)
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=2e-5)
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("width", [6, 7])
def test_channels_are_dropped_independently_of_each_other(width):
    # Two channels share a random word; neither their shares nor their correlation may show it.
    dropped = np.asarray(dropout(jax.numpy.ones((40_000, width)), 0.4, jax.random.key(1))) == 0
    np.testing.assert_allclose(dropped.mean(0), 0.4, atol=0.015)
    correlation = np.corrcoef(dropped.T) - np.eye(width)
    assert np.abs(correlation).max() < 0.025


def test_dropout_without_a_key_changes_nothing():
    ones = jax.numpy.ones((3, 4))
    np.testing.assert_array_equal(dropout(ones, 0.4, None), ones)
