"""The noise model in front of the Transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from b2txt_jax.model.interface import make_model
from b2txt_jax.model.triple_transformer import TripleTransformerSettings

FEATURES, DAYS = 4, 2
SETTINGS = TripleTransformerSettings(
    name="triple_transformer",
    dtype="float32",
    width=16,
    layers=1,
    heads=2,
    head_width=8,
    feedforward=24,
    context=0.8,
    units=8,
    noise_units=6,
    noisy_layers=1,
)
DAY = np.array([0, 1])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="shared layer", marks=pytest.mark.slow),
        pytest.param(True, id="day layers"),
    ],
)
def model(request):
    return make_model(dataclasses.replace(SETTINGS, day_layer=request.param), FEATURES, DAYS)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(2, 48, FEATURES)).astype(np.float32)


@pytest.mark.slow
def test_the_noise_is_subtracted_from_the_transformer_s_patches(model, params, x):
    whole = jax.jit(model.full)
    full = whole(params, x, np.array([48, 30]), DAY)
    assert full.frames.tolist() == [12, 8]
    assert full.aux["noise"].shape == (2, 12, 4 * FEATURES)
    clean = {**params, "noise": jax.tree.map(jnp.zeros_like, params["noise"])}
    silent = whole(clean, x, np.array([48, 30]), DAY)
    alone = jax.jit(model.clean.apply)(params["clean"], x, np.array([48, 30]), DAY)
    np.testing.assert_allclose(silent.logits, alone.logits, atol=1e-6)
    assert np.abs(np.asarray(full.logits - alone.logits)).max() > 1e-3


@pytest.mark.slow
def test_the_adversary_s_gradient_comes_back_reversed_and_scaled(model, params, x):
    def noisy(params, reversal):
        return model.full(params, x, np.array([48, 30]), DAY, None, reversal).aux["noisy"].sum()

    gradient = jax.jit(jax.grad(noisy))
    half, one = (gradient(params, jnp.float32(factor)) for factor in (0.5, 1.0))
    for small, large in zip(
        jax.tree.leaves(half["noise"]), jax.tree.leaves(one["noise"]), strict=True
    ):
        np.testing.assert_allclose(2 * small, large, rtol=1e-4, atol=1e-6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(one["clean"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(one["noisy"]))


@pytest.mark.slow
def test_a_stream_equals_the_whole_trial(model, params, x):
    whole = jax.jit(model.apply)(params, x, np.array([48, 48]), DAY).logits
    start, step = model.stream()
    step = jax.jit(step)
    state, parts = start(params, 2), []
    for first in range(0, 48, 6):
        logits, state = step(params, x[:, first : first + 6], DAY, state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


@pytest.mark.slow
def test_padding_changes_no_logit(model, params, x):
    padded = np.concatenate([x[1:, :30], np.full((1, 37, FEATURES), 3.0, np.float32)], axis=1)
    whole = jax.jit(model.apply)(params, x, np.array([48, 30]), DAY).logits[1, :8]
    alone = jax.jit(model.apply)(params, padded, np.array([30]), DAY[1:]).logits[0, :8]
    np.testing.assert_allclose(alone, whole, atol=2e-6)
