"""The Transformer against PyTorch: logits, gradients, training; and what never changes a logit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformer import TorchTransformer, largest_difference

from b2txt_jax.config import ConfigError, load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.model.dropout import quarters as drawn_quarters
from b2txt_jax.model.interface import make_model
from b2txt_jax.model.transformer import Transformer, TransformerSettings, attention, by_distance
from b2txt_jax.training.optimizer import make_optimizer
from b2txt_jax.training.step import TrainState, make_train_step

FEATURES, DAYS = 6, 3
SMALL = TransformerSettings(
    name="transformer",
    dtype="float32",
    width=24,
    layers=2,
    heads=3,
    head_width=8,
    feedforward=40,
    distances=7,
    context=0.96,  # 12 frames
    context_least=0.4,
    context_most=0.96,
)
NO_DROPOUT = dataclasses.replace(SMALL, dropout=0.0, input_dropout=0.0)
BINS, DAY = np.array([90, 61, 118, 0, 3]), np.array([0, 2, 1, 0, 1])


@pytest.fixture(scope="module")
def trials():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(count, FEATURES)).astype(np.float32) for count in BINS]


def padded(trials, length):
    """Padding that is not zero, as smoothing leaves it behind a trial."""
    noise = np.random.default_rng(1).normal(size=(len(trials), length, FEATURES))
    for row, trial in zip(noise, trials, strict=True):
        row[: len(trial)] = trial
    return noise.astype(np.float32)


@functools.cache
def applied(settings):
    return jax.jit(make_model(settings, FEATURES, DAYS).apply)


def torch_model(settings, dtype=torch.float32):
    torch.manual_seed(0)
    return TorchTransformer(settings, FEATURES, DAYS).to(dtype).eval()


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        dataclasses.replace(SMALL, day_layer=True),
        pytest.param(
            dataclasses.replace(SMALL, patch_size=3, context=30.0, distances=200),
            marks=pytest.mark.slow,
        ),
        dataclasses.replace(SMALL, layers=1, context=0.0, heads=1),
    ],
    ids=["short context", "day layer", "whole trial", "frame by itself"],
)
def test_logits_and_gradients_equal_torch(settings, trials):
    theirs = torch_model(settings, torch.float64)
    model, params = make_model(settings, FEATURES, DAYS), theirs.ours()
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, fresh)
    context = int(settings.context * 50 / settings.patch_size)
    rows = [row for row in range(len(BINS)) if BINS[row]]
    expected = {
        row: theirs(torch.tensor(trials[row], dtype=torch.float64), DAY[row], context)
        for row in rows
    }
    x = padded(trials, 124)
    rng = np.random.default_rng(2)
    weights = np.zeros((len(BINS), -(-124 // settings.patch_size), 41))
    for row in rows:
        weights[row, : len(expected[row])] = rng.normal(size=expected[row].shape)
    sum((expected[r] * torch.tensor(weights[r, : len(expected[r])])).sum() for r in rows).backward()

    @jax.jit
    def loss_and_gradient(params):
        def loss(params):
            output = model.apply(params, x, BINS, DAY)
            return (output.logits * weights).sum(), output

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, output), gradient = loss_and_gradient(params)
    assert output.frames.tolist() == [len(expected.get(row, ())) for row in range(len(BINS))]
    for row in rows:
        ours = output.logits[row, : output.frames[row]]
        np.testing.assert_allclose(ours, expected[row].detach(), atol=1e-5)
    assert largest_difference(gradient, theirs.ours(gradients=True)) < 1e-4


def test_padding_row_order_batch_size_and_other_rows_change_no_logit(trials):
    params, apply = torch_model(SMALL).ours(), applied(SMALL)
    whole = apply(params, padded(trials, 124), BINS, DAY)
    order = [4, 2, 0]
    others = padded([trials[row] for row in order], 161)
    moved = apply(params, others, BINS[order], DAY[order])
    for place, row in enumerate(order):
        size = int(whole.frames[row])
        np.testing.assert_allclose(moved.logits[place, :size], whole.logits[row, :size], atol=2e-6)
    broken = padded(trials, 124)
    broken[1:] = np.nan
    alone = apply(params, broken, BINS, DAY).logits[0, :23]
    np.testing.assert_array_equal(alone, whole.logits[0, :23])


def test_no_frame_sees_the_future_or_what_lies_before_its_context(trials):
    params, settings = torch_model(SMALL).ours(), dataclasses.replace(SMALL, layers=1)
    x = trials[2][None]
    changed = x.copy()
    changed[:, 40] += 1  # in frame 10
    bins, day = BINS[2:3], DAY[2:3]
    one, other = (applied(settings)(params, values, bins, day).logits for values in (x, changed))
    moved = np.flatnonzero(np.abs(np.asarray(one - other))[0].max(-1) > 1e-6)
    assert moved.tolist() == list(range(10, 10 + 12 + 1))


@pytest.mark.parametrize(("block", "frames"), [(1, 12), (5, 22), (16, 37), (40, 37)])
@pytest.mark.parametrize("context", [0, 3, 9, 40])
def test_blocks_of_any_size_attend_as_one(block, frames, context):
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, frames, 2, 4)).astype(np.float32)
    relative = rng.normal(size=6).astype(np.float32)
    distance = np.arange(frames)[:, None] - np.arange(frames)
    scores = np.einsum("bqhe,bkhe->bhqk", query, key) / 2 + relative[np.clip(distance, 0, 5)]
    scores = np.where((distance >= 0) & (distance <= context), scores, -np.inf)
    expected = np.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores), value)
    jitted = jax.jit(attention, static_argnums=(5, 6), static_argnames="block")
    float32 = jnp.dtype("float32")
    found = jitted(query, key, value, relative, context, context, float32, block=block)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(("rows", "columns", "known"), [(2, 5, 3), (4, 4, 9), (1, 1, 1), (3, 8, 1)])
def test_scalars_of_distances_stand_where_the_distances_are(rows, columns, known):
    relative = jnp.arange(1.0, known + 1)
    distance = columns - rows + np.arange(rows)[:, None] - np.arange(columns)
    expected = np.asarray(relative)[np.clip(distance, 0, known - 1)]
    np.testing.assert_array_equal(by_distance(relative, rows, columns), expected)


def test_a_stream_of_any_chunks_equals_the_whole_trial_and_compiles_once(trials):
    settings = dataclasses.replace(SMALL, day_layer=True)
    params, x, day = torch_model(settings).ours(), trials[2][None, :116], np.array([2])
    whole = applied(settings)(params, x, np.array([116]), day).logits[0]
    start, step = make_model(settings, FEATURES, DAYS).stream()
    step = jax.jit(step)
    for chunk, programs in ((4, 1), (12, 1), (7, 4)):
        state, parts = start(params, 1), []
        before = step._cache_size()
        size = sum(leaf.size for leaf in jax.tree.leaves(state.kept))
        for first in range(0, 112, chunk):
            logits, state = step(params, x[:, first : first + chunk], day, state)
            parts.append(logits[0])
        assert sum(leaf.size for leaf in jax.tree.leaves(state.kept)) == size
        found = np.concatenate(parts)
        np.testing.assert_allclose(found, whole[: len(found)], atol=1e-5)
        assert len(found) == 28 if 112 % chunk == 0 else len(found) > 25
        assert step._cache_size() - before <= programs + (112 % chunk > 0)


def test_a_stream_that_ends_within_a_patch_equals_the_whole_trial_with_day_layers(trials):
    settings = dataclasses.replace(SMALL, day_layer=True)
    params, x, day = torch_model(settings).ours(), trials[2][None, :14], np.array([2])
    params["day"]["bias"] = np.random.default_rng(0).normal(size=(DAYS, FEATURES))
    whole = applied(settings)(params, x, np.array([14]), day).logits
    start, step = make_model(settings, FEATURES, DAYS).stream()
    filled = np.pad(x, ((0, 0), (0, 2), (0, 0)))
    found = jax.jit(step)(params, filled, day, start(params, 1))[0]
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_a_training_context_that_is_shortest_above_its_longest_is_an_error():
    # Drawn from an empty range it would be 30 s, of which a block of queries has the keys in part.
    settings = dataclasses.replace(SMALL, context_least=30.0, context_most=20.0)
    with pytest.raises(ConfigError, match=r"context_least is 30 s and model.context_most 20 s"):
        make_model(settings, FEATURES, DAYS)


def test_a_frame_by_itself_streams_too(trials):
    settings = dataclasses.replace(SMALL, context=0.0)
    params, x, day = torch_model(settings).ours(), trials[2][None, :16], np.array([2])
    whole = applied(settings)(params, x, np.array([16]), day).logits
    start, step = make_model(settings, FEATURES, DAYS).stream()
    np.testing.assert_allclose(jax.jit(step)(params, x, day, start(params, 1))[0], whole, atol=1e-5)


@pytest.mark.slow
def test_the_context_of_a_training_step_is_uniform_and_compiles_once(monkeypatch):
    model = make_model(SMALL, FEATURES, DAYS)
    seen = []

    def recorded(query, key, value, relative, context, *_args, **_settings):
        jax.debug.callback(lambda drawn: seen.append(int(drawn)), context)
        return value

    monkeypatch.setattr("b2txt_jax.model.transformer.attention", recorded)
    params = jax.jit(model.init)(jax.random.key(0))
    apply = jax.jit(model.apply)
    x, bins, day = np.zeros((1, 8, FEATURES), np.float32), np.array([8]), np.array([0])
    for seed in range(400):
        apply(params, x, bins, day, jax.random.key(seed))
    jax.effects_barrier()
    assert apply._cache_size() == 1
    drawn = np.array(seen).reshape(400, SMALL.layers)
    assert (drawn == drawn[:, :1]).all()  # one draw for all layers
    values, counts = np.unique(drawn[:, 0], return_counts=True)
    assert values.tolist() == list(range(5, 13))
    assert np.abs(counts - 50).max() < 27


@pytest.mark.slow
def test_dropout_is_at_each_of_its_places_with_its_rate(monkeypatch):
    places, used = [], []

    def dropped(x, rate, drawn):
        assert drawn.shape == x.shape
        places.append((x.shape, rate))
        return x

    def dropout(x, rate, key, label):
        places.append((x.shape, rate))
        used.append(key)
        return x

    def quarters(key, *others, **axis):
        used.append(key)
        return drawn_quarters(key, *others, **axis)

    for recorded in (dropped, dropout, quarters):
        monkeypatch.setattr(f"b2txt_jax.model.transformer.{recorded.__name__}", recorded)
    settings = dataclasses.replace(SMALL, layers=1)
    model, x = make_model(settings, FEATURES, DAYS), np.zeros((2, 40, FEATURES), np.float32)
    params = jax.jit(model.init)(jax.random.key(0))
    model.apply(params, x, np.full(2, 40), np.zeros(2, int), jax.random.key(1))
    assert places == [
        ((2, 10, 24), 0.2),  # embedded patches
        ((2, 3, 10, 10), 0.35),  # attention weights
        ((2, 10, 24), 0.35),  # attention
        ((2, 10, 40), 0.35),  # hidden
        ((2, 10, 24), 0.35),  # feed-forward
    ]
    keys = {tuple(np.asarray(jax.random.key_data(key))) for key in used}
    assert len(keys) == 5


def test_bfloat16_products_keep_logits_close_and_float32(trials):
    params = torch_model(SMALL).ours()
    x, bins, day = padded(trials, 120), BINS, DAY
    exact = applied(SMALL)(params, x, bins, day).logits
    half = applied(dataclasses.replace(SMALL, dtype="bfloat16"))(params, x, bins, day).logits
    assert half.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(half) - exact)[0, :22].max() < 0.1


@pytest.mark.slow
def test_fresh_parameters_are_spread_as_those_of_torch():
    settings = dataclasses.replace(SMALL, width=48, distances=200)
    theirs = TorchTransformer(settings, FEATURES, DAYS).ours()
    ours = jax.jit(make_model(settings, FEATURES, DAYS).init)(jax.random.key(0))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if one.size > 1000:
            assert np.std(one) == pytest.approx(np.std(other), rel=0.1)
        assert np.abs(one).max() == pytest.approx(np.abs(other).max(), rel=0.35)


def test_fifty_steps_give_the_losses_of_pytorch(trials):
    config = load_config("configs/nejm_baseline.py")
    augment = dataclasses.replace(config.signal, augment=(), smooth_std=0.0)
    rate = {"learning_rate": 0.002, "warmup_steps": 5, "epsilon": 1e-8, "clip_norm": 100.0}
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, feature_count=FEATURES),
        signal=augment,
        model=dataclasses.replace(NO_DROPOUT, context_least=0.96),
        optimizer=dataclasses.replace(config.optimizer, **rate, weight_decay=1e-5),
    )
    rng, theirs = np.random.default_rng(3), torch_model(config.model)
    patterns = rng.normal(size=(41, FEATURES))

    def batch():
        labels, sizes = np.zeros((4, 6), np.int32), rng.integers(2, 7, 4).astype(np.int32)
        features, bins = np.zeros((4, 100, FEATURES), np.float32), np.zeros(4, np.int32)
        for row, size in enumerate(sizes):
            labels[row, :size] = rng.integers(1, 6, size)
            bins[row] = 12 * size + rng.integers(3, 20)
            shown = np.repeat(patterns[labels[row, :size]], 12, axis=0)
            features[row, : len(shown)] = shown
            features[row, : bins[row]] += 0.3 * rng.normal(size=(bins[row], FEATURES))
        return Batch(features, bins, rng.integers(0, DAYS, 4).astype(np.int32), labels, sizes)

    model: Transformer = make_model(config.model, FEATURES, DAYS)
    params = jax.tree.map(jnp.asarray, theirs.ours())
    state = TrainState(
        jnp.int32(0), params, make_optimizer(config.optimizer, model.group).init(params)
    )
    step = jax.jit(make_train_step(config, DAYS))
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 1e-5}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.002, eps=1e-8)
    losses = []
    for number in range(50):
        one = batch()
        state, metrics = step(state, one)
        for group in optimizer.param_groups:
            group["lr"] = 0.002 * min(number / 5, 1)
        rows = [
            theirs(torch.tensor(one.features[r, : one.bins[r]]), one.day[r], 12).log_softmax(-1)
            for r in range(4)
        ]
        loss = torch.stack(
            [
                torch.nn.functional.ctc_loss(
                    row[:, None],
                    torch.tensor(one.labels[r, : one.label_length[r]])[None],
                    (len(row),),
                    (int(one.label_length[r]),),
                    reduction="sum",
                )
                for r, row in enumerate(rows)
            ]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 100.0)
        optimizer.step()
        losses.append((float(metrics.loss), float(loss.detach())))
    ours, expected = np.array(losses).T
    np.testing.assert_allclose(ours, expected, rtol=2e-3)
    assert ours[-5:].mean() < 0.6 * ours[0]
