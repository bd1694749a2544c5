"""The decoder's sizes, patches and dropout; against PyTorch in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from b2txt_jax.config import load_config
from b2txt_jax.model.interface import make_model, parameter_count
from b2txt_jax.model.patches import frame_count, patches

FEATURES, DAYS = 6, 3
SMALL = dataclasses.replace(
    load_config("configs/nejm_baseline.py").model,
    units=16,
    layers=3,
    patch_size=4,
    patch_stride=2,
    dtype="float32",
    recurrence="scan",
)


def perturbed_params(model):
    params = jax.jit(make_model(model, FEATURES, DAYS).init)(jax.random.key(0))
    return jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape, a.dtype), params
    )


def test_the_published_model_has_44_315_177_parameters():
    model = load_config("configs/nejm_baseline.py").model
    shapes = jax.eval_shape(lambda: make_model(model, 512, 45).init(jax.random.key(0)))
    assert parameter_count(shapes) == 44_315_177


def test_a_patch_is_its_bins_one_after_another():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    np.testing.assert_array_equal(patches(x, 3, 2)[0], [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]])


@pytest.mark.parametrize(("bins", "frames"), [(13, 0), (14, 1), (17, 1), (18, 2), (1000, 247)])
def test_frame_count_is_the_published_formula(bins, frames):
    assert frame_count(bins, 14, 4) == frames
    assert int(frame_count(jnp.asarray(bins), 14, 4)) == frames


@pytest.mark.slow
def test_dropout_is_on_with_a_key_and_off_without():
    params = perturbed_params(SMALL)
    x = np.random.default_rng(2).normal(size=(2, 20, FEATURES)).astype(np.float32)
    day = np.zeros(2, int)
    bins = np.full(2, 20)
    apply = jax.jit(make_model(SMALL, FEATURES, DAYS).apply)  # op by op, loops compile anew
    again = [apply(params, x, bins, day).logits for _ in range(2)]
    np.testing.assert_array_equal(*again)
    first, second = (apply(params, x, bins, day, jax.random.key(k)).logits for k in (0, 1))
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_products_keep_float32_logits_close_to_the_float32_model():
    params = perturbed_params(SMALL)
    x = np.random.default_rng(2).normal(size=(2, 20, FEATURES)).astype(np.float32)
    day = np.array([0, 2])
    bins = np.full(2, 20)
    exact, half = (
        jax.jit(make_model(model, FEATURES, DAYS).apply)(params, x, bins, day).logits
        for model in (SMALL, dataclasses.replace(SMALL, dtype="bfloat16"))
    )
    assert half.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(half) - np.asarray(exact)).max() < 0.05
