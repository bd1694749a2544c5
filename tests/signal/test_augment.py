import dataclasses
from fractions import Fraction

import jax
import numpy as np
import pytest

from b2txt_jax.config import ConfigError, load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.signal.augment import augment, channel_mask, speckle, time_mask
from b2txt_jax.training.step import init_state, make_train_step

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


def masked_patches(bins, length, spans, fraction, patch, rows):
    """Which patches `time_mask` masks in `rows` trials of so many bins: bool [rows, patches]."""
    x = np.ones((rows, length, 1), np.float32)
    out, kept = time_mask(jax.random.key(0), x, np.full(rows, bins), spans, fraction, patch)
    np.testing.assert_array_equal(kept, bins)
    masked = np.asarray(out)[:, : length // patch * patch, 0].reshape(rows, -1, patch) == 0
    np.testing.assert_array_equal(masked.all(-1), masked.any(-1))  # whole patches only
    return masked.all(-1)


@pytest.mark.parametrize(
    ("bins", "fraction"),
    [pytest.param(40, 0.3, marks=pytest.mark.slow), (43, 0.25), (8, 0.5), (0, 0.9)],
)
def test_a_span_has_a_uniform_length_and_a_uniform_start_where_it_fits(bins, fraction):
    patches = -(-bins // 4)
    longest = int(Fraction(str(fraction)) * patches)
    expected = {(): 0.0}
    for length in range(longest + 1):
        for start in range(patches - length + 1):
            span = tuple(range(start, start + length))
            share = 1 / (longest + 1) / (patches - length + 1)
            expected[span] = expected.get(span, 0.0) + share
    rows = 20_000
    found = dict.fromkeys(expected, 0.0)
    for row in masked_patches(bins, 48, 1, fraction, 4, rows):
        found[tuple(np.flatnonzero(row).tolist())] += 1 / rows
    for span, share in expected.items():
        assert found[span] == pytest.approx(share, abs=5 * np.sqrt(0.25 / rows))


@pytest.mark.slow
def test_twenty_spans_of_a_twentieth_cover_what_the_same_draws_in_numpy_do():
    random = np.random.default_rng(0)
    patches, rows = 220, 400
    expected = np.zeros((rows, patches), bool)
    for row in expected:
        for length in random.integers(0, 11 + 1, 20):  # 0.05 * 220 = 11
            start = random.integers(0, patches - length + 1)
            row[start : start + length] = True
    found = masked_patches(880, 1000, 20, 0.05, 4, rows)
    assert not found[:, patches:].any()
    assert found.mean(where=np.arange(250) < patches) == pytest.approx(expected.mean(), abs=0.01)
    assert expected.mean() == pytest.approx(0.4, abs=0.03)  # as published
    both = found[:-1, :patches] & found[1:, :patches]  # trials are masked independently
    assert both.mean() == pytest.approx(expected.mean() ** 2, abs=0.01)


@pytest.mark.slow
def test_a_masked_patch_reaches_the_model_as_zeros_although_features_are_smoothed():
    """Listed first, it acts last: smoothing would fill a span of one patch."""
    signal = dataclasses.replace(
        OFF, augment=("time_mask", "white_noise"), time_mask_fraction=0.2, white_noise_std=1.0
    )
    key, ones = jax.random.key(3), np.ones((2, 400, 3), np.float32)
    before, bins = augment(key, ones, BINS, signal)
    assert np.asarray(before)[0].all()
    after, _ = augment(key, np.ones_like(ones), bins, signal, smoothed=True)
    spans = np.asarray(after)[0, :, 0].reshape(-1, 4)
    assert set(map(tuple, spans.tolist())) == {(0.0,) * 4, (1.0,) * 4}


@pytest.mark.slow
def test_the_training_step_masks_after_smoothing():
    """With everything masked but nothing else, the loss is that of features of zero."""
    config = load_config("configs/demo.py", ["--config.data.feature_count=4"])
    model = dataclasses.replace(config.model, units=8, layers=1, input_dropout=0.0, rnn_dropout=0.0)
    masks = {"augment": ("time_mask",), "time_mask_spans": 500, "time_mask_fraction": 0.99}
    config = dataclasses.replace(config, model=model, signal=dataclasses.replace(OFF, **masks))
    labels = np.full((2, 3), 5, np.int32) + np.arange(3, dtype=np.int32)
    features = np.random.default_rng(0).normal(size=(2, 60, 4)).astype(np.float32)
    bins, day = np.array([60, 60], np.int32), np.zeros(2, np.int32)
    step, state = jax.jit(make_train_step(config, 1)), init_state(config, 1)
    losses = [
        float(step(state, Batch(x, bins, day, labels, np.full(2, 3, np.int32)))[1].loss)
        for x in (features, np.zeros_like(features))
    ]
    assert losses[0] == losses[1]


def test_speckle_masks_single_features_for_a_whole_trial_at_its_rate():
    x = np.random.default_rng(0).normal(size=(300, 7, 64)).astype(np.float32)
    out = np.asarray(speckle(jax.random.key(0), x, np.full(300, 7), 0.2)[0])
    masked = (out == 0).all(1)
    np.testing.assert_array_equal(out, np.where(masked[:, None], 0, x))  # the others as they were
    assert masked.mean() == pytest.approx(0.2, abs=0.01)
    assert (masked[:, :32] & masked[:, 32:]).mean() == pytest.approx(0.04, abs=0.01)
    assert (masked[1:] & masked[:-1]).mean() == pytest.approx(0.04, abs=0.01)


def test_channel_mask_masks_both_features_of_a_channel():
    x = np.random.default_rng(0).normal(size=(300, 7, 64)).astype(np.float32)
    out = np.asarray(channel_mask(jax.random.key(0), x, np.full(300, 7), 0.3)[0])
    masked = (out == 0).all(1)
    np.testing.assert_array_equal(out, np.where(masked[:, None], 0, x))
    np.testing.assert_array_equal(masked[:, :32], masked[:, 32:])
    assert masked.mean() == pytest.approx(0.3, abs=0.015)
    with pytest.raises(ConfigError, match=r"data\.feature_count is 3; needed two features per"):
        channel_mask(jax.random.key(0), x[..., :3], np.full(300, 7), 0.3)
