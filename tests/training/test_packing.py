"""Trials that share rows: losses and gradients as alone, and layouts that keep the rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import losses, train_here
from hypothesis import given, settings
from hypothesis import strategies as st

from b2txt_jax.config import ConfigError, load_config
from b2txt_jax.data.batches.layout import (
    Rules,
    Shape,
    choose_shapes,
    lay_out,
    needed_shape,
)
from b2txt_jax.data.batches.shapes import choose
from b2txt_jax.data.loader import Batch
from b2txt_jax.data.typical import typical_lengths
from b2txt_jax.model.gru.recurrence import recurrence
from b2txt_jax.training.step import (
    init_state,
    make_train_step,
    packing_rules,
)

DAYS, FEATURES, TRIALS = 3, 6, 12
NOISE = {
    "signal.augment": (
        "white_noise",
        "constant_offset",
        "random_walk",
        "speckle",
        "channel_mask",
        "random_cut",
        "time_mask",
    ),
    "signal.random_walk_std": 0.1,
    "signal.time_mask_patch": 4,
}
GRU = {"model.units": 8, "model.layers": 2, "model.input_dropout": 0.3, "model.rnn_dropout": 0.3}
TRANSFORMER = {
    "model.name": "transformer",
    "model.width": 16,
    "model.layers": 2,
    "model.heads": 5,
    "model.head_width": 4,
    "model.feedforward": 16,
    "model.context": 1.0,
    "model.context_least": 0.5,
    "model.context_most": 1.0,
}
MODELS = {"gru": GRU | {"model.recurrence": "scan"}, "transformer": TRANSFORMER}


def config_of(keys):
    values = {"data.feature_count": FEATURES, "train.steps": 20, "optimizer.warmup_steps": 1}
    values |= {"optimizer.day_warmup_steps": 1} | NOISE | keys
    return load_config("configs/demo.py", [f"--config.{key}={v}" for key, v in values.items()])


def trials_of(step, count=TRIALS):
    """Features, day and labels of the trials of a batch, as a plan would draw them: by day."""
    rng = np.random.default_rng(step)
    days = np.sort(rng.integers(0, DAYS, count))
    return [
        (
            rng.normal(size=(int(bins), FEATURES)).astype(np.float32),
            int(day),
            rng.integers(1, 41, int(rng.integers(1, 4))).astype(np.int32),
        )
        for day, bins in zip(days, rng.integers(30, 76, count), strict=True)
    ]


def one_by_one(trials, length):
    features = np.zeros((len(trials), length, FEATURES), np.float32)
    labels = np.zeros((len(trials), 4), np.int32)
    counts = np.zeros((3, len(trials)), np.int32)
    for row, (x, day, label) in enumerate(trials):
        features[row, : len(x)], labels[row, : len(label)] = x, label
        counts[:, row] = len(x), day, len(label)
    return Batch(features, counts[0], counts[1], labels, counts[2])


def shared(trials, rules, shape=None):
    bins, days = [len(x) for x, *_ in trials], [day for _, day, _ in trials]
    shape = shape or needed_shape(bins, days, Shape(rules.groups, 160, 4, 5), rules)
    layout = lay_out(bins, days, shape, rules)
    features = np.zeros((shape.rows, shape.bins, FEATURES), np.float32)
    day, lengths = np.zeros(shape.rows, np.int32), np.zeros_like(layout.start)
    labels = np.zeros((*layout.slot.shape, 4), np.int32)
    label_length = np.zeros_like(layout.slot)
    for (row, segment), index in np.ndenumerate(layout.trial):
        if index >= 0:
            x, day[row], _ = trials[index]
            at = layout.start[row, segment]
            features[row, at : at + len(x)], lengths[row, segment] = x, len(x)
    per_group = shape.rows // rules.groups
    for (group, place), slot in np.ndenumerate(layout.slot):
        if slot >= 0:
            row, segment = divmod(int(slot), shape.segments)
            label = trials[layout.trial[group * per_group + row, segment]][2]
            labels[group, place, : len(label)] = label
            label_length[group, place] = len(label)
    return Batch(
        features, lengths, day, labels, label_length, layout.start, layout.trial, layout.slot
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru", pytest.param("transformer", marks=pytest.mark.slow)])
def test_five_steps_are_those_of_trials_alone_with_noise_and_dropout(name):
    config = config_of(MODELS[name])
    rules = packing_rules(config, DAYS, 1)
    step = jax.jit(make_train_step(config, DAYS))
    alone = packed = init_state(config, DAYS)
    for number in range(5):
        trials = trials_of(number)
        batch = shared(trials, rules, Shape(7, 160, 4, 5, TRIALS))
        assert len(batch.features) < len(trials)
        alone, wanted = step(alone, one_by_one(trials, 160))
        packed, found = step(packed, batch)
        assert float(found.loss) == pytest.approx(float(wanted.loss), rel=2e-5)
        assert float(found.gradient_norm) == pytest.approx(float(wanted.gradient_norm), rel=1e-4)
        assert int(found.infeasible) == int(wanted.infeasible)
    for one, other in zip(
        jax.tree.leaves(packed.params), jax.tree.leaves(alone.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["scan", pytest.param("pallas", marks=pytest.mark.slow)])
def test_each_trial_of_a_row_has_the_states_and_the_gradient_of_itself_alone(kind):
    rng = np.random.default_rng(0)
    lengths, hidden = [[5, 9, 6], [20]], 8
    x = rng.normal(size=(20, 2, 3 * hidden)).astype(np.float32)
    rest = [rng.normal(size=s).astype(np.float32) for s in ((2, 8), (24, 8), (24,))]
    cotangent = rng.normal(size=(20, 2, hidden)).astype(np.float32)
    begins = np.zeros((20, 2), bool)
    for row, row_lengths in enumerate(lengths):
        begins[np.cumsum([0, *row_lengths[:-1]]), row] = True

    def together(x, *rest):
        return recurrence(x, *rest, jnp.dtype("float32"), kind, jnp.asarray(begins))

    def apart(x, h0, *rest):
        rows = []
        for row, row_lengths in enumerate(lengths):
            parts = jnp.split(x[:, row : row + 1], np.cumsum(row_lengths)[:-1])
            first = h0[row : row + 1]
            states = [recurrence(p, first, *rest, jnp.dtype("float32"), "scan") for p in parts]
            rows.append(jnp.concatenate(states))
        return jnp.concatenate(rows, axis=1)

    def values_and_gradients(function):
        states, backward = jax.vjp(function, x, *rest)
        return [states, *backward(cotangent)]

    found, wanted = values_and_gradients(together), values_and_gradients(apart)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


LENGTHS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(
    LENGTHS,
    st.sampled_from([1, 3, 4]),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
)
def test_every_trial_is_laid_out_once_apart_aligned_and_with_those_of_its_day(
    trials, stride, gap, one_day, groups
):
    bins, days = zip(*trials, strict=True)
    rules = Rules(stride, gap, one_day, groups)
    shape = needed_shape(bins, days, Shape(groups, 16, 16, 3), rules)
    layout = lay_out(bins, days, shape, rules)
    assert layout is not None
    assert shape.bins % 16 == 0
    assert shape.rows % groups == 0
    found = layout.trial[layout.trial >= 0]
    assert sorted(found) == list(range(len(trials)))
    for row, starts in zip(layout.trial, layout.start, strict=True):
        there = row >= 0
        assert (starts[~there] == shape.bins).all()
        ends = [start + bins[i] for i, start in zip(row[there], starts[there], strict=True)]
        assert (starts[there] % stride == 0).all()
        assert all(end <= shape.bins for end in ends)
        assert (starts[there][1:] >= np.array(ends[:-1], int) + gap).all()
        assert not one_day or len({days[i] for i in row[there]}) <= 1
    by_slot = layout.trial.reshape(groups, -1)
    listed = [by_slot[g, slot] for (g, _), slot in np.ndenumerate(layout.slot) if slot >= 0]
    assert sorted(listed) == list(range(len(trials)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.booleans(), st.sampled_from([1, 4]))
def test_the_chosen_shapes_hold_every_batch_of_the_sample(seed, one_day, groups):
    rng = np.random.default_rng(seed)
    batches = [
        (rng.integers(20, 400, 12).tolist(), np.repeat([0, 1, 2], 4).tolist()) for _ in range(10)
    ]
    rules = Rules(4, 4, one_day, groups)
    shapes = choose_shapes(batches, 30, rules)
    assert len(shapes) <= 3
    for bins, days in batches:
        assert any(lay_out(bins, days, shape, rules) for shape in shapes)
    spare = choose_shapes(batches, 30, rules, others=1000)[-1]
    assert (spare.bins, spare.rows > shapes[-1].rows) == (1008, True)


def test_packing_is_off_for_models_and_augmentations_that_take_one_trial_a_row():
    only_gain = {"signal.static_gain_std": 0.1, "signal.augment": ("static_gain",)}
    gain = config_of(GRU | only_gain | {"signal.random_walk_std": 0.0})
    triple = config_of({"model.name": "triple_gru", "model.noise_units": 4})
    for config, said in ((gain, "an augmentation"), (triple, "model 'triple_gru'")):
        assert packing_rules(config, DAYS, 1) is None
        data = dataclasses.replace(config.data, packing="on")
        with pytest.raises(ConfigError, match=f"data.packing is 'on', but {said}.*; needed 'auto'"):
            packing_rules(dataclasses.replace(config, data=data), DAYS, 1)


def test_with_lengths_like_the_recordings_a_fifth_at_most_of_what_is_computed_is_padding():
    config = load_config("configs/nejm_baseline.py")
    lengths = typical_lengths()
    steps = config.train.steps
    trials = config.data.batch_rows * np.mean([np.mean(day, axis=0)[0] for day in lengths])
    found = {
        rules is not None: choose(config.data, config.data.buckets, lengths, rules, 1, steps)
        for rules in (None, packing_rules(config, 45, 1))
    }
    for shapes in found.values():
        assert sum(shapes.share.values()) == pytest.approx(1)
    assert all(found[False].share.values())  # the four smaller buckets are never needed
    assert len(found[False].share) == 2
    assert found[False].computed / trials > 2.8
    assert found[True].computed / trials < 1.22
    assert len(found[True].share) <= 4  # with one to spare


def test_a_short_run_compiles_few_shapes_and_none_that_no_batch_has():
    config = load_config("configs/nejm_baseline.py")
    rules = packing_rules(config, 45, 1)
    found = choose(config.data, config.data.buckets, typical_lengths(), rules, 1, 60)
    assert (len(found.share), found.rules) == (1, rules)
    assert all(found.share.values())


@pytest.mark.slow
def test_a_packed_run_has_the_losses_of_the_same_run_with_one_trial_a_row(tiny_overrides, tmp_path):
    keys = [
        "--config.data.trials_per_day=2",
        "--config.train.log_every=1",
        "--config.train.steps=4",
    ]
    found = {}
    for mode in ("off", "on"):
        folder = tmp_path / mode
        train_here(folder, [*tiny_overrides, *keys, f"--config.data.packing={mode}"])
        found[mode] = losses(folder)
    assert len(found["on"]) == 4
    np.testing.assert_allclose(found["on"], found["off"], rtol=1e-4)
