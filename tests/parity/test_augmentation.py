"""Augmentation against the published noise, drawn by PyTorch: the same distribution, and shared
over the same axes. Seeds are fixed."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from published import noise
from scipy.stats import chisquare, ks_2samp

from b2txt_jax.config import load_config
from b2txt_jax.signal.augment import augment

OFF = dataclasses.replace(
    load_config("configs/nejm_baseline.py").signal,
    white_noise_std=0.0,
    constant_offset_std=0.0,
    random_cut=0,
)
SHAPE = (40, 30, 25)
KINDS = {
    "white": {"white_noise_std": 1.0},
    "offset": {"constant_offset_std": 0.2},
    "walk": {"random_walk_std": 0.3},
}


def ours(settings, seed=0):
    signal = dataclasses.replace(OFF, **settings)
    bins = np.full(SHAPE[0], SHAPE[1], np.int32)
    features = np.zeros(SHAPE, np.float32)
    return np.asarray(
        jax.jit(augment, static_argnums=3)(jax.random.key(seed), features, bins, signal)[0]
    )


def theirs(settings, seed=0):
    std = {
        kind: value
        for kind, keys in KINDS.items()
        for key, value in settings.items()
        if key in keys
    }
    return noise(std, SHAPE, torch.Generator().manual_seed(seed)).numpy()


def correlations(values):
    """Correlation of neighbours along trials, bins and channels."""
    found = []
    for axis in range(3):
        moved = np.moveaxis(values, axis, 0)
        found.append(np.corrcoef(moved[:-1].ravel(), moved[1:].ravel())[0, 1])
    return found


@pytest.mark.parametrize(
    "settings",
    [*KINDS.values(), {"white_noise_std": 1.0, "constant_offset_std": 0.2}],
    ids=[*KINDS, "published"],
)
def test_noise_has_the_mean_variance_shape_and_shared_axes_of_the_published(settings):
    mine, published = ours(settings), theirs(settings)
    # Offsets are 1,000 draws, white noise 30,000. The steps of a walk add up, which leaves as much
    # as 1,800 draws of it. Bounds of about four standard errors of the difference.
    bound = 0.1 if {*settings} & {"constant_offset_std", "random_walk_std"} else 0.03
    assert mine.std() == pytest.approx(published.std(), rel=bound)
    assert abs(mine.mean()) < 4 * mine.std() / np.sqrt(SHAPE[0] * SHAPE[2])
    np.testing.assert_allclose(correlations(mine), correlations(published), atol=0.1)
    # One bin and channel of each trial: independent draws in both.
    assert ks_2samp(mine[:, 7, ::8].ravel(), published[:, 7, ::8].ravel()).pvalue > 0.01
    assert (
        ks_2samp(ours(settings, 1)[:, 3, ::8].ravel(), published[:, 3, ::8].ravel()).pvalue > 0.01
    )


def test_an_offset_is_the_same_in_every_bin_and_white_noise_in_none():
    assert (np.ptp(ours(KINDS["offset"]), axis=1) == 0).all()
    assert (np.ptp(theirs(KINDS["offset"]), axis=1) == 0).all()
    assert correlations(ours(KINDS["offset"]))[1] == pytest.approx(1)
    assert np.abs(correlations(ours(KINDS["white"]))).max() < 0.03


def test_the_walk_gathers_over_channels_as_the_published_one():
    mine, published = (np.var(draw(KINDS["walk"]), axis=(0, 1)) for draw in (ours, theirs))
    np.testing.assert_allclose(mine, published, rtol=0.25)
    np.testing.assert_allclose(mine, 0.09 * np.arange(1, 26), rtol=0.25)


def test_gain_is_one_matrix_near_the_identity_per_trial_as_published():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 20, 6)).astype(np.float32)
    signal = dataclasses.replace(OFF, static_gain_std=0.1)
    bins = np.full(60, 20, np.int32)
    mixed = np.asarray(augment(jax.random.key(0), features, bins, signal)[0])
    matrices = np.stack(
        [np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(features, mixed, strict=True)]
    )
    np.testing.assert_allclose(features @ matrices, mixed, atol=1e-4)
    published = (
        0.1 * torch.randn(matrices.shape, generator=torch.Generator().manual_seed(0)).numpy()
    )
    deviation = matrices - np.eye(6)
    assert deviation.std() == pytest.approx(published.std(), rel=0.08)
    assert ks_2samp(deviation.ravel(), published.ravel()).pvalue > 0.01


def test_the_cut_is_uniform_and_equals_slicing_the_start_off():
    signal = dataclasses.replace(OFF, random_cut=3)
    features = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)
    features[1, 9:] = 0
    bins = np.array([12, 9], np.int32)
    cut_of = jax.jit(lambda key: augment(key, features, bins, signal))
    counts = np.zeros(3)
    for key in jax.random.split(jax.random.key(0), 600):
        shifted, left = (np.asarray(value) for value in cut_of(key))
        cut = 12 - int(left[0])
        counts[cut] += 1
        assert left.tolist() == [12 - cut, 9 - cut]
        # NEJM: features[:, cut:]; here the shape stays, with zeros at the end
        np.testing.assert_array_equal(shifted[:, : 12 - cut], torch.tensor(features)[:, cut:])
        assert not shifted[:, 12 - cut :].any()
    # the published draw: numpy's randint(0, 3)
    assert counts.sum() == 600
    assert chisquare(counts).pvalue > 0.01
