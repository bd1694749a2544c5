"""All layers as one loop against layer after layer: values, gradients, trials of a row, dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from b2txt_jax.config import load_config
from b2txt_jax.model.gru.recurrence import along_wavefront
from b2txt_jax.model.gru.scan import gru_recurrence
from b2txt_jax.model.gru.wavefront import Stack, wavefront
from b2txt_jax.model.interface import make_model
from b2txt_jax.model.product import linear
from b2txt_jax.segments import Segments

HIDDEN, ROWS = 5, 3
SCALE = 1.6


def layered(projected, h0, stack, dtype, kept=None, scale=1.0, begins=None):
    x = gru_recurrence(projected, h0, stack.weight_hh[0], stack.bias_hh[0], dtype, begins)
    for above in range(len(stack.weight_ih)):
        if kept is not None:
            x = jnp.where(kept[:, above], x * scale, 0).astype(dtype)
        x = (linear(x, stack.weight_ih[above], dtype) + stack.bias_ih[above]).astype(dtype)
        weight, bias = stack.weight_hh[above + 1], stack.bias_hh[above + 1]
        x = gru_recurrence(x, h0, weight, bias, dtype, begins)
    return x


def arguments(frames, layers, masked, shared):
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    stack = Stack(
        normal(layers - 1, 3 * HIDDEN, HIDDEN, scale=0.5),
        normal(layers - 1, 3 * HIDDEN),
        normal(layers, 3 * HIDDEN, HIDDEN, scale=0.5),
        normal(layers, 3 * HIDDEN),
    )
    kept = jnp.asarray(rng.random((frames, layers - 1, ROWS, HIDDEN)) < 0.6) if masked else None
    begins = None
    if shared:  # the first row holds one trial, the others several
        begins = rng.random((frames, ROWS)) < 0.3
        begins[0], begins[1:, 0] = True, False
        begins = jnp.asarray(begins)
    inputs = normal(frames, ROWS, 3 * HIDDEN), normal(ROWS, HIDDEN), stack
    return inputs, kept, begins, normal(frames, ROWS, HIDDEN)


@pytest.mark.parametrize(
    ("frames", "layers", "masked", "shared"),
    [(9, 5, True, True), (2, 4, False, False)],
    ids=["dropout and trials of a row", "fewer frames than layers"],
)
def test_float32_values_and_gradients_are_those_of_layer_after_layer(
    frames, layers, masked, shared
):
    inputs, kept, begins, cotangent = arguments(frames, layers, masked, shared)

    def values_and_gradients(function):
        def loss(*inputs):
            states = function(*inputs, jnp.dtype("float32"), kept, SCALE, begins)
            return (states * cotangent).sum(), states

        gradients, states = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return [states, *jax.tree.leaves(gradients)]

    ours, theirs = values_and_gradients(wavefront), values_and_gradients(layered)
    assert len(ours) == 7
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1e-6 * max(1, np.abs(other).max())


@pytest.mark.slow
def test_bfloat16_differs_by_its_own_rounding():
    (projected, *rest), kept, begins, _ = arguments(9, 3, True, True)
    dtype = jnp.dtype("bfloat16")
    inputs = projected.astype(dtype), *rest
    ours, theirs = (f(*inputs, dtype, kept, SCALE, begins) for f in (wavefront, layered))
    assert ours.dtype == theirs.dtype == dtype
    assert np.abs(np.asarray(ours - theirs, np.float32)).max() <= 2**-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru", pytest.param("triple_gru", marks=pytest.mark.slow)])
def test_a_model_along_the_wavefront_has_the_loss_and_gradient_of_the_layered_one(name):
    keys = {"name": name, "units": 6, "layers": 3, "patch_size": 4, "patch_stride": 2}
    keys |= {"rnn_dropout": 0.4} | ({"noise_units": 4} if name == "triple_gru" else {})
    settings = load_config(
        "configs/demo.py", [f"--config.model.{key}={value}" for key, value in keys.items()]
    ).model
    x = np.random.default_rng(0).normal(size=(2, 30, 4)).astype(np.float32)
    day, bins, more = np.array([0, 1]), np.array([30, 20]), {}
    if name == "gru":
        start = jnp.array([[0, 12], [0, 30]])
        bins = np.array([[10, 18], [20, 0]])
        more = {"segments": Segments(start, jnp.array([[0, 1], [2, -1]]))}

    def found(kind):
        model = make_model(dataclasses.replace(settings, recurrence=kind), 4, 2)
        params = jax.jit(model.init)(jax.random.key(0))

        def loss(params):
            def mean(logits, frames):
                return jnp.sin(logits).mean()

            return model.loss(params, x, bins, day, mean, jax.random.key(1), **more)[0]

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))

    for one, other in zip(found("wavefront"), found("scan"), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * max(1, np.abs(other).max()))


@pytest.mark.parametrize(
    ("kind", "platform", "layers", "expected"),
    [
        ("auto", "gpu", 5, True),
        ("auto", "gpu", 1, False),
        ("auto", "tpu", 5, False),
        ("auto", "cpu", 5, False),
        ("scan", "gpu", 5, False),
        ("wavefront", "cpu", 5, True),
    ],
)
def test_auto_takes_the_wavefront_on_a_gpu_alone(kind, platform, layers, expected):
    device = AbstractDevice(device_kind="some", num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert along_wavefront(kind, layers) is expected
