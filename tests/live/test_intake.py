"""Bins that are missing, late, doubled, too narrow, NaN or dead: replaced and counted."""

import dataclasses

import numpy as np
import pytest

from b2txt_jax.config import load_config
from b2txt_jax.live.intake import Intake
from b2txt_jax.live.sources.interface import Bin
from b2txt_jax.signal.rolling import cold

FEATURES = 512
SIGNAL = load_config("demo").signal


@pytest.fixture
def bins():
    return np.random.default_rng(0).normal(size=(700, FEATURES)).astype(np.float32)


def taken(bins, numbers, signal=SIGNAL):
    intake = Intake(bins.shape[1], signal, cold(bins.shape[1]))
    parts = [intake.take(Bin(bins[number], number, 0.0))[1] for number in numbers]
    return np.concatenate(parts), intake.health


def test_whole_bins_pass_unchanged(bins):
    found, health = taken(bins, range(700))
    np.testing.assert_array_equal(found, bins)
    assert health.problems == {}


def test_missing_late_and_doubled_bins_are_replaced_and_counted(bins):
    found, health = taken(bins, [0, 1, 4, 2, 4, 5, 3, 6])
    expected = bins[:7].copy()
    expected[2:4] = 0
    np.testing.assert_array_equal(found, expected)
    assert health.problems == {"dropped": 2, "late": 2, "doubled": 1}


def test_a_pause_and_a_restart_of_the_source_insert_nothing(bins):
    found, health = taken(bins, [600, 601, 0, 1, 2, 500])
    np.testing.assert_array_equal(found, bins[[600, 601, 0, 1, 2, 500]])
    assert health.problems == {"jumps": 2}


@pytest.mark.parametrize("first", [0, 20])
def test_a_source_that_starts_anew_within_a_second_loses_no_bin(bins, first):
    numbers = [*range(first, first + 30), *range(60)]
    arrived = np.concatenate([bins[: len(numbers) - 60], bins[100:160]])
    intake = Intake(FEATURES, SIGNAL, cold(FEATURES))
    parts = [
        intake.take(Bin(row, number, 0.0))[1] for row, number in zip(arrived, numbers, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), arrived)
    assert intake.health.problems == {"jumps": 1}


def test_bins_that_are_sent_again_as_they_were_are_left_out_whatever_is_missing_in_them(bins):
    bins[3, :7] = np.nan
    found, health = taken(bins, [0, 1, 2, 3, 0, 1, 2, 3, 6, 4, 4, 5, 7])
    assert len(found) == 8
    assert health.problems["doubled"] == 5
    assert (health.dropped, health.late, health.jumps) == (2, 2, 0)


def test_bins_without_numbers_are_all_taken(bins):
    intake = Intake(FEATURES, SIGNAL, cold(FEATURES))
    assert sum(len(intake.take(Bin(row, None, 0.0))[1]) for row in bins[:9]) == 9


def test_another_number_of_channels_is_a_missing_bin(bins):
    intake = Intake(FEATURES, SIGNAL, cold(FEATURES))
    raw, found = intake.take(Bin(bins[0, :256], 0, 0.0))
    assert np.isnan(raw).all()
    assert (found == 0).all()
    assert intake.health.problems == {"wrong width": 1}


@pytest.mark.parametrize("rolling", [0.0, 2.0])
def test_nan_channels_become_the_mean_and_no_nan_reaches_the_model(bins, rolling):
    bins[20:, [3, 7]] = np.nan, np.inf
    found, health = taken(bins, range(60), dataclasses.replace(SIGNAL, rolling_seconds=rolling))
    assert np.isfinite(found).all()
    assert (found[20:, [3, 7]] == 0).all()
    assert health.problems == {"missing values": 80, "missing channels": 2}


def test_a_dead_array_and_a_dead_channel_become_the_mean_and_are_named(bins):
    array = np.r_[64:128, 256 + 64 : 256 + 128]  # both features of the second array
    bins[10:, array] = 3.0
    bins[5:, 0] = 9.0
    found, health = taken(bins, range(700))
    assert health.dead_arrays == (1,)
    assert health.dead_channels == (0, *array)
    assert (found[34, array] == 3.0).all()
    assert (found[35:, array] == 0).all()  # after half a second
    assert found[504, 0] == 9.0
    assert (found[505:, 0] == 0).all()  # after ten seconds
