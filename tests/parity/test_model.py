"""The decoder and its parts against PyTorch in float64: values, gradients, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from published import PublishedDecoder, differences, fill, frames_of, losses_of, random_params

from b2txt_jax.config import load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.model import patches as patch_ways
from b2txt_jax.model import toom_cook
from b2txt_jax.model.day_layer import day_layer
from b2txt_jax.model.gru.scan import gru_recurrence
from b2txt_jax.model.interface import make_model
from b2txt_jax.model.patches import frame_count, patches, project_patches
from b2txt_jax.training.step import make_eval_step

FEATURES, DAYS = 6, 4
BASELINE = load_config("configs/nejm_baseline.py")
SMALL = dataclasses.replace(BASELINE.model, units=16, layers=3, dtype="float32", recurrence="scan")
DAY = np.array([0, 2, 1, 1, 0])  # the last day has no trial


@pytest.mark.parametrize(
    "model",
    [
        dataclasses.replace(SMALL, layers=5),
        dataclasses.replace(SMALL, day_layer=False),
        dataclasses.replace(SMALL, patch_size=4, patch_stride=3),
        dataclasses.replace(SMALL, patch_size=0, layers=1),
    ],
    ids=["five layers", "shared input layer", "other patches", "no patches"],
)
def test_logits_and_gradients_equal_torch(model):
    params = random_params(model, FEATURES, DAYS)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 62, FEATURES)).astype(np.float32)
    decoder = fill(PublishedDecoder(model, FEATURES, DAYS), params).eval()
    mirror = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = decoder(mirror, DAY.tolist())
    weights = rng.normal(size=expected.shape)
    (expected * torch.tensor(weights)).sum().backward()

    network = make_model(model, FEATURES, DAYS)

    @jax.jit
    def loss_and_gradients(params, x):
        def loss(params, x):
            logits = network.apply(params, x, np.full(5, 62), DAY).logits
            return (logits * weights).sum(), logits

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    (_, logits), (gradient, x_gradient) = loss_and_gradients(params, x)
    np.testing.assert_allclose(logits, expected.detach(), atol=5e-6)
    found = differences(decoder, gradient, gradients=True)
    assert max(found.values()) < 2e-5, found
    np.testing.assert_allclose(x_gradient, mirror.grad, atol=2e-5)


@pytest.mark.parametrize("frames", [1, 2, 50])
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["usual", "saturated gates"])
def test_the_recurrence_and_its_own_backward_pass_equal_torch(frames, scale):
    batch, hidden = 3, 12
    rng = np.random.default_rng(frames)
    projected, h0, weight, bias, weights = (
        rng.normal(size=shape).astype(np.float32)
        for shape in (
            (frames, batch, 3 * hidden),
            (batch, hidden),
            (3 * hidden, hidden),
            (3 * hidden,),
            (frames, batch, hidden),
        )
    )
    projected *= scale
    weight /= np.sqrt(hidden)
    dtype = jnp.dtype("float32")

    @jax.jit
    def states_and_gradients(*values):
        states, backward = jax.vjp(lambda *v: gru_recurrence(*v, dtype), *values)
        return states, backward(weights)

    states, gradients = states_and_gradients(projected, h0, weight, bias)
    ours = [
        torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for v in (projected, h0, weight, bias)
    ]
    # An identity as input weight makes torch's input the projection.
    identity = torch.eye(3 * hidden, dtype=torch.float64)
    no_bias = torch.zeros(3 * hidden, dtype=torch.float64)
    expected, _ = torch._VF.gru(
        ours[0],
        ours[1][None],
        [identity, ours[2], no_bias, ours[3]],
        True,
        1,
        0.0,
        False,
        False,
        False,
    )
    np.testing.assert_allclose(states, expected.detach(), atol=3e-6)
    (expected * torch.tensor(weights)).sum().backward()
    for mirror, gradient in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(gradient, mirror.grad, rtol=1e-4, atol=2e-5)


def test_day_layers_of_mixed_days_equal_a_linear_layer_per_trial():
    rng = np.random.default_rng(0)
    x, weight, bias, weights = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((5, 7, 6), (DAYS, 6, 6), (DAYS, 6), (5, 7, 6))
    )
    dtype = jnp.dtype("float32")

    @jax.jit
    def values_and_gradients(*values):
        result, backward = jax.vjp(lambda x, w, b: day_layer(x, DAY, w, b, dtype), *values)
        return result, backward(weights)

    result, gradients = values_and_gradients(x, weight, bias)
    ours = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, weight, bias)]
    expected = torch.stack(
        [
            torch.nn.functional.softsign(torch.nn.functional.linear(row, ours[1][d].T, ours[2][d]))
            for row, d in zip(ours[0], DAY, strict=True)
        ]
    )
    np.testing.assert_allclose(result, expected.detach(), atol=1e-6)
    (expected * torch.tensor(weights)).sum().backward()
    for mirror, gradient in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(gradient, mirror.grad, atol=1e-5)
    # The optimizer takes a day with a zero gradient for one without trials.
    assert not np.asarray(gradients[1])[3].any()
    assert not np.asarray(gradients[2])[3].any()


def unfolded_in_float64(x, weight, size, stride, weights):
    """Return PyTorch's patches, their projection, and the gradients of its sum with weights."""
    x64, weight64 = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, weight))
    frames = x64.unfold(1, size, stride).transpose(2, 3).flatten(2)
    projected = frames @ weight64.T
    (projected * torch.tensor(weights)).sum().backward()
    return frames.detach(), projected.detach(), (x64.grad, weight64.grad)


@pytest.mark.parametrize("rows", [2, 8], ids=["few rows", "rows enough for a convolution"])
@pytest.mark.parametrize(
    ("bins", "size", "stride"), [(30, 14, 4), (14, 14, 4), (31, 4, 3), (9, 1, 1), (20, 5, 7)]
)
def test_patches_and_their_projection_equal_torch_unfold(bins, size, stride, rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, bins, 5)).astype(np.float32)
    weight = rng.normal(size=(7, size * 5)).astype(np.float32)
    weights = rng.normal(size=(rows, (bins - size) // stride + 1, 7)).astype(np.float32)
    unfolded, expected, (of_x, of_weight) = unfolded_in_float64(x, weight, size, stride, weights)
    np.testing.assert_array_equal(patches(jnp.asarray(x), size, stride), unfolded.float())

    @jax.jit
    def values_and_gradients(x, weight):
        result, backward = jax.vjp(
            lambda x, w: project_patches(x, w, size, stride, jnp.dtype("float32")), x, weight
        )
        return result, backward(weights)

    result, gradients = values_and_gradients(x, weight)
    assert result.shape[1] == frame_count(bins, size, stride)
    np.testing.assert_allclose(result, expected, atol=2e-5)
    np.testing.assert_allclose(gradients[0], of_x, atol=2e-5)
    np.testing.assert_allclose(gradients[1], of_weight, atol=2e-5)


def random_patches(bins, size, stride):
    """Features, weight, and weights of the result whose sum has the gradients."""
    rng = np.random.default_rng(1)
    shapes = (3, bins, 5), (7, size * 5), (3, (bins - size) // stride + 1, 7)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize(
    ("bins", "size", "stride"), [(45, 14, 4), (70, 7, 4), (14, 14, 4), (33, 3, 1), (52, 17, 3)]
)
def test_fewer_products_project_patches_as_torch_unfold_does(bins, size, stride):
    x, weight, weights = random_patches(bins, size, stride)
    _, expected, (of_x, of_weight) = unfolded_in_float64(x, weight, size, stride, weights)
    projected = jax.jit(toom_cook.project, static_argnums=(2, 3))(x, weight, size, stride)
    np.testing.assert_allclose(projected, expected, atol=1e-4)
    gradients = jax.jit(toom_cook.gradients, static_argnums=(3, 4))(
        x, weight, weights, size, stride
    )
    np.testing.assert_allclose(gradients[0], of_x, atol=1e-4)
    np.testing.assert_allclose(gradients[1], of_weight, atol=1e-4)


@pytest.mark.parametrize(("bins", "size", "stride"), [(47, 14, 4), (14, 14, 4), (33, 3, 3)])
def test_products_of_patches_equal_torch_unfold(bins, size, stride):
    x, weight, weights = random_patches(bins, size, stride)
    _, expected, (of_x, of_weight) = unfolded_in_float64(x, weight, size, stride, weights)
    settings = {"size": size, "stride": stride, "dtype": jnp.dtype("float32")}
    projected = patch_ways.multiplied(x, weight, **settings)
    np.testing.assert_allclose(projected, expected, atol=2e-5)
    d_x, d_weight = patch_ways.multiplied_gradients(x, weight, jnp.asarray(weights), **settings)
    np.testing.assert_allclose(d_x, of_x, atol=2e-5)
    np.testing.assert_allclose(d_weight, of_weight, atol=2e-5)


def test_a_cpu_projects_many_frames_without_a_convolution_and_equals_torch():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(10, 430, 4)).astype(np.float32)
    weight = rng.normal(size=(6, 14 * 4)).astype(np.float32)
    weights = rng.normal(size=(10, 105, 6)).astype(np.float32)
    _, expected, (of_x, of_weight) = unfolded_in_float64(x, weight, 14, 4, weights)

    @jax.jit
    def loss(x, weight):
        projected = project_patches(x, weight, 14, 4, jnp.dtype("float32"))
        return (projected * weights).sum(), projected

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    assert " convolution(" not in both.lower(x, weight).compile().as_text()
    (_, projected), gradients = both(x, weight)
    np.testing.assert_allclose(projected, expected, atol=1e-4)
    np.testing.assert_allclose(gradients[0], of_x, atol=1e-4)
    np.testing.assert_allclose(gradients[1], of_weight, atol=2e-4)


def test_the_number_of_frames_is_the_published_one_for_every_length():
    bins = np.arange(14, 3000)
    ours = frame_count(jnp.asarray(bins), 14, 4)
    np.testing.assert_array_equal(ours, frames_of(bins, BASELINE.model))
    # Less than a patch gives no frame here; the published formula goes below zero.
    assert not np.asarray(frame_count(jnp.arange(14), 14, 4)).any()


def test_how_far_trials_are_padded_changes_neither_logits_nor_loss():
    config = dataclasses.replace(
        BASELINE,
        data=dataclasses.replace(BASELINE.data, feature_count=FEATURES),
        model=dataclasses.replace(SMALL, layers=2),
    )
    params = random_params(config.model, FEATURES, DAYS)
    decoder = fill(PublishedDecoder(config.model, FEATURES, DAYS), params).eval()
    rng = np.random.default_rng(0)
    bins = np.array([90, 61, 118, 70], np.int32)
    size = np.array([5, 0, 9, 3], np.int32)
    day = np.array([3, 0, 0, 2], np.int32)
    trials = [rng.normal(size=(count, FEATURES)).astype(np.float32) for count in bins]
    labels = rng.integers(1, 41, (4, 9)).astype(np.int32)

    def batch(rows, length, longest):
        features = np.stack([np.pad(trials[k], ((0, length - bins[k]), (0, 0))) for k in rows])
        padded = np.pad(labels[rows], ((0, 0), (0, longest - 9)))
        return Batch(features, bins[rows], day[rows], padded, size[rows])

    step = jax.jit(make_eval_step(config, DAYS))
    tight, loose = (step(params, batch(np.arange(4), *shape)) for shape in ((118, 9), (203, 20)))
    for k in range(4):
        # The reference sees each trial by itself, without a bin of padding.
        alone = batch(np.array([k]), int(bins[k]), 9)
        with torch.no_grad():
            loss, logits, frames = losses_of(decoder, alone, config)
        for output in (tight, loose):
            assert int(output.frames[k]) == int(frames[0])
            np.testing.assert_allclose(output.logits[k, : int(frames[0])], logits[0], atol=5e-6)
            np.testing.assert_allclose(output.loss[k], loss[0], rtol=2e-6)
