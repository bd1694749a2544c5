import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from b2txt_jax.config import Config, ConfigError, load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.model.interface import make_model
from b2txt_jax.signal.smooth import smooth
from b2txt_jax.training.step import (
    init_state,
    make_eval_step,
    make_loss,
    make_train_step,
    step_keys,
)

DAYS = 2


@pytest.fixture(scope="module")
def small():
    return load_config(
        "configs/demo.py",
        [
            "--config.model.units=8",
            "--config.model.layers=1",
            "--config.model.recurrence=scan",
            "--config.data.feature_count=5",
        ],
    )


@functools.cache
def train_step_of(config: Config):
    """Compiled once for all tests that take the same step."""
    return jax.jit(make_train_step(config, DAYS))


def batch_of(rows, length=60, seed=0, longest=8):
    rng = np.random.default_rng(seed)
    return Batch(
        rng.normal(size=(rows, length, 5)).astype(np.float32),
        np.full(rows, length, np.int32),
        (np.arange(rows) % DAYS).astype(np.int32),
        rng.integers(1, 41, (rows, longest)).astype(np.int32),
        np.full(rows, 3, np.int32),
    )


def without_noise(config: Config) -> Config:
    quiet = dataclasses.replace(
        config.signal, white_noise_std=0.0, constant_offset_std=0.0, random_cut=1
    )
    model = dataclasses.replace(config.model, input_dropout=0.0, rnn_dropout=0.0)
    return dataclasses.replace(config, signal=quiet, model=model)


def test_keys_are_a_function_of_seed_and_step_and_differ_by_use():
    keys = [
        jax.random.key_data(key).tolist()
        for seed in (0, 1)
        for step in (0, 1)
        for key in step_keys(seed, step)
    ]
    assert len({tuple(key) for key in keys}) == 8
    again = jax.random.key_data(step_keys(1, 1).dropout).tolist()
    assert again == keys[-1]


@pytest.mark.slow
def test_a_seed_that_is_an_argument_draws_as_the_configured_one(small):
    step, state, seed = train_step_of(small), init_state(small, DAYS), small.train.seed
    given = [float(step(state, batch_of(4), np.int32(seed + n))[1].loss) for n in (0, 1)]
    configured = float(step(state, batch_of(4))[1].loss)
    np.testing.assert_allclose(given[0], configured, rtol=1e-6)
    assert abs(given[1] - configured) > 1e-3


@pytest.mark.slow
def test_training_lowers_the_loss_of_a_batch_it_sees_again_and_again(small):
    config = without_noise(small)
    step = train_step_of(config)
    state, losses = init_state(config, DAYS), []
    for _ in range(150):
        state, metrics = step(state, batch_of(4))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[1]
    assert int(state.step) == 150


@pytest.mark.slow
def test_the_first_step_has_rate_zero_and_changes_nothing(small):
    state = init_state(small, DAYS)
    after, _ = train_step_of(small)(state, batch_of(4))
    for before, now in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True
    ):
        np.testing.assert_array_equal(before, now)


@pytest.mark.slow
def test_a_row_that_cannot_be_aligned_is_counted_and_does_not_train(small):
    config = without_noise(small)
    step = train_step_of(config)
    batch = batch_of(2, longest=30)
    lengths = np.array([3, 30], np.int32)  # 60 bins are 12 frames
    _, metrics = step(init_state(config, DAYS), batch._replace(label_length=lengths))
    alone = jax.tree.map(lambda a: a[:1], batch._replace(label_length=lengths))
    _, expected = step(init_state(config, DAYS), alone)
    assert int(metrics.infeasible) == 1
    assert bool(metrics.finite)
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-5)


@pytest.mark.slow
def test_a_step_that_is_not_finite_says_so_and_leaves_the_parameters_as_they_were(small):
    step = train_step_of(small)
    state, _ = step(init_state(small, DAYS), batch_of(4))
    batch = batch_of(4)
    batch.features[1, 7, 2] = np.nan
    after, metrics = step(state, batch)
    assert not bool(metrics.finite)
    for before, now in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True
    ):
        np.testing.assert_array_equal(before, now)


@pytest.mark.slow
def test_padding_of_a_batch_never_changes_the_training_loss_without_noise(small):
    config = without_noise(small)
    step = train_step_of(config)
    batch = batch_of(4)
    longer = batch._replace(
        features=np.pad(batch.features, ((0, 0), (0, 41), (0, 0))),
        labels=np.pad(batch.labels, ((0, 0), (0, 9))),
    )
    losses = [float(step(init_state(config, DAYS), b)[1].loss) for b in (batch, longer)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_valid_padding_gives_the_logits_of_a_trial_cut_by_half_a_kernel_at_each_end(small):
    valid = dataclasses.replace(
        small, signal=dataclasses.replace(small.signal, eval_padding="valid")
    )
    params = init_state(small, DAYS).params
    batch = batch_of(3)
    same = jax.jit(make_eval_step(small, DAYS))(params, batch)
    cut = jax.jit(make_eval_step(valid, DAYS))(params, batch)
    assert list(cut.frames) == [(60 - 8 - 14) // 4 + 1] * 3
    assert list(same.frames) == [(60 - 14) // 4 + 1] * 3
    # Nine taps: 'valid' has no bin whose smoothing reached beyond the trial, four less at each end.
    smoothed = jax.numpy.asarray(smooth(batch.features, 2.0, 100))[:, 4:-4]
    model = make_model(small.model, 5, DAYS)
    expected = model.apply(params, smoothed, batch.bins - 8, batch.day).logits
    np.testing.assert_allclose(cut.logits, expected, atol=1e-5)


@pytest.mark.slow
def test_the_loss_divided_by_label_length_is_torchs_mean_with_its_gradient(small):
    """Torch's reduction "mean" divides by the label's length, or by 1 without labels."""
    config = without_noise(small)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, ctc_per_label=True)
    )
    lengths = np.array([1, 7, 3, 0], np.int32)
    batch = batch_of(4)._replace(label_length=lengths)
    state = init_state(config, DAYS)
    _, metrics = train_step_of(config)(state, batch)
    output = jax.jit(make_eval_step(config, DAYS))(state.params, batch)
    theirs = torch.nn.CTCLoss(blank=0, reduction="mean")(
        torch.tensor(np.asarray(output.logits), dtype=torch.float64)
        .log_softmax(-1)
        .transpose(0, 1),
        torch.tensor(batch.labels),
        torch.tensor(np.asarray(output.frames)),
        torch.tensor(lengths),
    )
    assert float(metrics.loss) == pytest.approx(float(theirs), rel=1e-5)
    one = jax.tree.map(lambda a: a[1:2], batch)  # a row's gradient is a seventh
    plain = train_step_of(without_noise(small))(state, one)[1]
    divided = train_step_of(config)(state, one)[1]
    assert float(divided.gradient_norm) == pytest.approx(float(plain.gradient_norm) / 7, rel=1e-4)


@pytest.mark.slow
def test_the_averaged_weights_are_those_computed_by_hand(small):
    config = without_noise(small)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, ema=0.3))
    step = train_step_of(config)
    state = init_state(config, DAYS)
    expected = jax.tree.map(np.asarray, state.params)
    for number, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]):  # (1 + n) / (10 + n)
        state, _ = step(state, batch_of(4, seed=number))
        expected = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new), expected, state.params
        )
        jax.tree.map(
            lambda ours, by_hand: np.testing.assert_allclose(ours, by_hand, rtol=1e-5, atol=1e-7),
            state.ema,
            expected,
        )
    batch = batch_of(4)
    batch.features[0, 0, 0] = np.nan
    after, _ = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.ema, state.ema)


@pytest.mark.slow
def test_channels_of_sessions_with_other_widths_are_not_masked_as_if_halves_were_the_same(small):
    data = dataclasses.replace(small.data, feature_count=6, widths=(4, 6))
    signal = dataclasses.replace(small.signal, augment=("channel_mask",))
    with pytest.raises(ConfigError, match="list 'speckle'"):
        make_loss(dataclasses.replace(small, data=data, signal=signal), 2)


def test_averaging_changes_nothing_of_the_training(small):
    """And without it there is no second copy of the weights."""
    with_ema = dataclasses.replace(small, train=dataclasses.replace(small.train, ema=0.9))
    states = [init_state(config, DAYS) for config in (small, with_ema)]
    for seed in range(3):
        states = [
            train_step_of(config)(state, batch_of(4, seed=seed))[0]
            for config, state in zip((small, with_ema), states, strict=True)
        ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),  # other fusions
        states[0].params,
        states[1].params,
    )
    assert states[0].ema is None
