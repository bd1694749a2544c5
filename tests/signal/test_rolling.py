"""Causal normalisation: bin by bin as whole trials, from the past alone, missing values and all."""

import dataclasses

import numpy as np
import pytest

from b2txt_jax.config import load_config
from b2txt_jax.signal.rolling import (
    StatisticsError,
    cold,
    normalise,
    read_statistics,
    write_statistics,
)

FEATURES = 6
SIGNAL = dataclasses.replace(load_config("demo").signal, log=True, rolling_seconds=2.0)


def raw(bins=400, seed=0):
    """Counts and band power with an offset a thousand times its deviation, and a dead channel."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(3.0, (bins, FEATURES)).astype(np.float32)
    x[:, 3:] = 1000 + rng.normal(size=(bins, 3))
    x[:, 5] = 7.0
    return x


@pytest.mark.parametrize("chunk", [1, 4, 17])
@pytest.mark.parametrize("missing", [False, True])
def test_chunks_of_any_size_give_what_the_whole_recording_gives(chunk, missing):
    x = raw()
    if missing:
        x[50:80, 1] = np.nan
    whole, after = normalise(x, cold(FEATURES), SIGNAL)
    statistics, parts = cold(FEATURES), []
    for first in range(0, len(x), chunk):
        part, statistics = normalise(x[first : first + chunk], statistics, SIGNAL)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
    np.testing.assert_allclose(np.stack(statistics), np.stack(after), rtol=1e-9)


def test_the_result_is_that_of_the_definition_and_of_the_past_alone():
    x, share = raw(120), 2 / 101
    found = normalise(x, cold(FEATURES), SIGNAL)[0]
    logged = np.log1p(np.float64(x))
    weights = share * (1 - share) ** np.arange(120)[::-1]
    mean = weights @ logged / weights.sum()
    deviation = np.sqrt(weights @ (logged - mean) ** 2 / weights.sum())
    np.testing.assert_allclose(found[-1, :5], (logged[-1] - mean)[:5] / deviation[:5], atol=1e-4)
    assert (found[:, 5] == 0).all()  # a channel that never changes
    np.testing.assert_array_equal(found[:60], normalise(x[:60], cold(FEATURES), SIGNAL)[0])


def test_a_jump_is_clipped_and_missing_values_are_the_mean_and_leave_the_statistics_alone():
    x, statistics = raw(), normalise(raw(seed=1), cold(FEATURES), SIGNAL)[1]
    x[10] = 1e6
    found = normalise(x, statistics, SIGNAL)[0]
    assert found.max() == SIGNAL.rolling_clip
    missing, after = normalise(np.full((30, FEATURES), np.nan), statistics, SIGNAL)
    assert (missing == 0).all()
    np.testing.assert_array_equal(np.stack(after), np.stack(statistics))


def test_statistics_start_the_next_session_where_the_last_one_ended(tmp_path):
    path = tmp_path / "statistics.npz"
    statistics = normalise(raw(), cold(FEATURES), SIGNAL)[1]
    write_statistics(path, statistics)
    warm = normalise(raw(seed=1), read_statistics(path, FEATURES), SIGNAL)[0]
    np.testing.assert_allclose(warm, normalise(raw(seed=1), statistics, SIGNAL)[0], atol=1e-5)
    assert np.abs(warm[:5, :3]).mean() > 0.1  # a cold start knows no deviation yet
    with pytest.raises(StatisticsError, match=r"of 6 features.*of 512.*cold start"):
        read_statistics(path, 512)
    path.write_bytes(b"nothing")
    with pytest.raises(StatisticsError, match="cannot be read"):
        read_statistics(path, FEATURES)
