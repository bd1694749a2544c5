"""The decoder against torch.nn.functional and torch's GRU, an independent implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from b2txt_jax.config import load_config
from b2txt_jax.model.decoder import init_params, make_apply, parameter_count
from b2txt_jax.model.patches import frame_count, patches, project_patches

FEATURES, DAYS = 6, 3
SMALL = dataclasses.replace(
    load_config("configs/nejm_baseline.py").model,
    units=16,
    layers=3,
    patch_size=4,
    patch_stride=2,
    dtype="float32",
)


def perturbed_params(model):
    params = init_params(model, FEATURES, DAYS, jax.random.key(0))
    return jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape, a.dtype), params
    )


def torch_logits(params, x, day, model):
    """Reference: [B, T, D] -> [B, P, 41] in float64, by unfold and torch's own GRU."""
    x = torch.as_tensor(x, dtype=torch.float64)
    weight, bias = params["day"]["weight"], params["day"]["bias"]
    day = day if weight.shape[0] > 1 else np.zeros_like(day)
    x = torch.nn.functional.softsign(
        torch.einsum("btd,bdk->btk", x, weight[day]) + bias[day][:, None]
    )
    if model.patch_size:
        x = x.unfold(1, model.patch_size, model.patch_stride).permute(0, 1, 3, 2).flatten(2)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = [params["gru"][f"{name}_l{k}"] for k in range(model.layers) for name in names]
    h0 = params["h0"].expand(model.layers, len(x), model.units).contiguous()
    out, _ = torch._VF.gru(x, h0, weights, True, model.layers, 0.0, False, False, True)
    return out @ params["head"]["weight"].T + params["head"]["bias"]


@pytest.mark.parametrize(
    "model",
    [
        SMALL,
        dataclasses.replace(SMALL, day_layer=False),
        dataclasses.replace(SMALL, patch_size=0, layers=1),
    ],
    ids=["baseline", "shared input layer", "no patches"],
)
def test_logits_and_gradients_equal_torch(model):
    params = perturbed_params(model)
    rng = np.random.default_rng(0)
    x, day = rng.normal(size=(5, 20, FEATURES)).astype(np.float32), np.array([0, 2, 1, 1, 0])
    apply = make_apply(model, FEATURES, DAYS)
    logits = apply(params, x, day)
    mirror = jax.tree.map(
        lambda a: torch.tensor(np.asarray(a), dtype=torch.float64, requires_grad=True), params
    )
    expected = torch_logits(mirror, x, day, model)
    np.testing.assert_allclose(logits, expected.detach(), atol=2e-6)

    weights = rng.normal(size=expected.shape)
    (expected * torch.tensor(weights)).sum().backward()
    gradient = jax.grad(lambda p: (apply(p, x, day) * weights).sum())(params)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(mirror), strict=True):
        np.testing.assert_allclose(ours, theirs.grad, atol=1e-4, rtol=1e-4)


def test_the_published_model_has_44_315_177_parameters():
    model = load_config("configs/nejm_baseline.py").model
    shapes = jax.eval_shape(lambda: init_params(model, 512, 45, jax.random.key(0)))
    assert parameter_count(shapes) == 44_315_177


def test_initialisation_has_the_published_distributions():
    model = dataclasses.replace(SMALL, units=64)
    params = init_params(model, 32, 2, jax.random.key(3))
    np.testing.assert_array_equal(params["day"]["weight"], np.stack([np.eye(32)] * 2))
    assert not params["day"]["bias"].any()
    recurrent = np.asarray(params["gru"]["weight_hh_l1"])
    np.testing.assert_allclose(recurrent.T @ recurrent, np.eye(64), atol=1e-5)
    limits = {
        ("gru", "weight_ih_l0"): np.sqrt(6 / (3 * 64 + 4 * 32)),
        ("gru", "weight_ih_l2"): np.sqrt(6 / (3 * 64 + 64)),
        ("gru", "bias_ih_l0"): 1 / 8,
        ("gru", "bias_hh_l1"): 1 / 8,
        ("head", "weight"): np.sqrt(6 / (41 + 64)),
        ("head", "bias"): 1 / 8,
    }
    for (part, name), limit in limits.items():
        values = np.asarray(params[part][name])
        assert 0.85 * limit < np.abs(values).max() <= limit, name
        assert values.std() == pytest.approx(limit / np.sqrt(3), rel=0.2), name
    assert np.abs(params["h0"]).max() <= np.sqrt(6 / 128)


def test_how_far_a_trial_is_padded_never_changes_its_logits():
    params = perturbed_params(SMALL)
    x = np.random.default_rng(1).normal(size=(2, 20, FEATURES)).astype(np.float32)
    day = np.array([0, 1])
    apply = make_apply(SMALL, FEATURES, DAYS)
    short = np.asarray(apply(params, x, day))
    padded = np.asarray(apply(params, np.pad(x, ((0, 3), (0, 30), (0, 0))), np.pad(day, (0, 3))))
    np.testing.assert_allclose(padded[:2, : short.shape[1]], short, atol=1e-6)


def test_projected_patches_equal_patches_times_weight():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 30, 5)), rng.normal(size=(7, 20))
    expected = np.asarray(patches(jnp.asarray(x), 4, 3)) @ weight.T
    got = project_patches(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 4, 3)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.shape[1] == frame_count(30, 4, 3)


def test_a_patch_is_its_bins_one_after_another():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    np.testing.assert_array_equal(patches(x, 3, 2)[0], [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]])


@pytest.mark.parametrize(("bins", "frames"), [(13, 0), (14, 1), (17, 1), (18, 2), (1000, 247)])
def test_frame_count_is_the_published_formula(bins, frames):
    assert frame_count(bins, 14, 4) == frames
    assert int(frame_count(jnp.asarray(bins), 14, 4)) == frames


def test_dropout_drops_the_stated_share_between_layers_and_nothing_without_a_key():
    params = perturbed_params(SMALL)
    x = np.random.default_rng(2).normal(size=(2, 20, FEATURES)).astype(np.float32)
    day = np.zeros(2, int)
    apply = make_apply(SMALL, FEATURES, DAYS)
    np.testing.assert_array_equal(apply(params, x, day), apply(params, x, day))
    first, second = (apply(params, x, day, jax.random.key(k)) for k in (0, 1))
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3


def test_bfloat16_products_keep_float32_logits_close_to_the_float32_model():
    params = perturbed_params(SMALL)
    x = np.random.default_rng(2).normal(size=(2, 20, FEATURES)).astype(np.float32)
    day = np.array([0, 2])
    exact = np.asarray(make_apply(SMALL, FEATURES, DAYS)(params, x, day))
    half = make_apply(dataclasses.replace(SMALL, dtype="bfloat16"), FEATURES, DAYS)(params, x, day)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(half) - exact).max() < 0.05
