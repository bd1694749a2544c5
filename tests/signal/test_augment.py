import dataclasses

import jax
import numpy as np
import pytest

from b2txt_jax.config import ConfigError, load_config
from b2txt_jax.signal.augment import augment

OFF = dataclasses.replace(
    load_config("configs/nejm_baseline.py").signal,
    white_noise_std=0.0,
    constant_offset_std=0.0,
    random_cut=1,
)
BINS = np.array([400, 300], np.int32)


def noise_of(signal, seed=0, channels=64):
    """What `augment` adds to zeros."""
    features = np.zeros((2, 400, channels), np.float32)
    return np.asarray(augment(jax.random.key(seed), features, BINS, signal)[0])


def test_white_noise_is_independent_over_trials_bins_and_channels():
    noise = noise_of(dataclasses.replace(OFF, white_noise_std=1.5))
    assert noise[0].std() == pytest.approx(1.5, rel=0.02)
    assert abs(np.corrcoef(noise[0, :-1].ravel(), noise[0, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[0, :300].ravel(), noise[1, :300].ravel())[0, 1]) < 0.02


def test_the_offset_is_constant_over_time_and_different_for_each_trial_and_channel():
    noise = noise_of(dataclasses.replace(OFF, constant_offset_std=0.2), channels=4096)
    assert (noise[0] == noise[0, :1]).all()
    assert noise[0, 0].std() == pytest.approx(0.2, rel=0.05)
    assert abs(np.corrcoef(noise[0, 0], noise[1, 0])[0, 1]) < 0.06


def test_the_random_walk_runs_over_channels_as_published():
    noise = noise_of(dataclasses.replace(OFF, random_walk_std=1.0), channels=256)
    steps = np.diff(noise[0], axis=-1)
    assert steps.std() == pytest.approx(1.0, rel=0.02)
    assert noise[0, :, -1].std() == pytest.approx(16.0, rel=0.15)


def test_static_gain_mixes_channels_of_a_trial_by_one_matrix_near_the_identity():
    features = np.random.default_rng(0).normal(size=(2, 400, 8)).astype(np.float32)
    signal = dataclasses.replace(OFF, static_gain_std=0.1)
    mixed = np.asarray(augment(jax.random.key(0), features, np.array([400, 400]), signal)[0])
    matrix, residual = np.linalg.lstsq(features[0], mixed[0], rcond=None)[:2]
    assert residual.max() < 1e-4
    assert 0.02 < (matrix - np.eye(8)).std() < 0.2


def test_padding_stays_zero_so_that_it_cannot_leak_into_the_trial():
    signal = dataclasses.replace(OFF, white_noise_std=1.0, constant_offset_std=0.2, random_cut=3)
    features = np.ones((2, 400, 4), np.float32)
    noisy, bins = augment(jax.random.key(1), features, BINS, signal)
    assert (np.asarray(noisy)[1, int(bins[1]) :] == 0).all()


def test_one_cut_for_the_batch_takes_bins_from_the_start_and_shortens_every_trial():
    signal = dataclasses.replace(OFF, random_cut=3)
    ramp = np.tile(np.arange(1, 401, dtype=np.float32)[None, :, None], (2, 1, 3))
    cuts = set()
    for seed in range(40):
        cut_ramp, bins = augment(jax.random.key(seed), ramp, BINS, signal)
        cut = 400 - int(bins[0])
        assert list(bins) == [400 - cut, 300 - cut]
        np.testing.assert_array_equal(np.asarray(cut_ramp)[0, : 400 - cut], ramp[0, cut:])
        cuts.add(cut)
    assert cuts == {0, 1, 2}


def test_the_list_decides_which_augmentations_there_are_and_their_order(tmp_path, monkeypatch):
    (tmp_path / "scaling.py").write_text(
        "def scaled(key, x, bins, by=2):\n    return by * x, bins\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    noisy = dataclasses.replace(OFF, white_noise_std=1.0)
    only = noise_of(dataclasses.replace(noisy, augment=("white_noise",)))
    for entries, factor in (
        (("white_noise", "scaling:scaled(by=3)"), 3),
        (("scaling:scaled", "white_noise"), 1),
    ):
        found = noise_of(dataclasses.replace(noisy, augment=entries))
        assert found.std() == pytest.approx(factor * only.std(), rel=0.02)
    assert not noise_of(dataclasses.replace(noisy, augment=())).any()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("pink_noise", "'pink_noise'; needed one of static_gain"),
        ("json:nothing", "has no 'nothing'"),
        ("no_such:thing", "cannot be imported"),
        ("json:dumps(3)", "needed package.module:function"),
        ("json:dumps(x=os.x)", "settings cannot be read"),
    ],
)
def test_an_entry_that_names_no_augmentation_is_an_error(entry, message):
    with pytest.raises(ConfigError, match=message):
        noise_of(dataclasses.replace(OFF, augment=(entry,)))
