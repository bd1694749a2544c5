import jax
import numpy as np
import pytest

from b2txt_jax.model.decoder import _dropout


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_dropout_zeroes_the_stated_share_and_keeps_the_mean(rate):
    dropped = np.asarray(_dropout(jax.numpy.ones((200, 500)), rate, jax.random.key(0)))
    assert (dropped == 0).mean() == pytest.approx(rate, abs=0.01)
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=1e-6)
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)


def test_dropout_without_a_key_changes_nothing():
    ones = jax.numpy.ones((3, 4))
    np.testing.assert_array_equal(_dropout(ones, 0.4, None), ones)
