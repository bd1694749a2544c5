"""The wide recurrence against the plain one: values, gradients, chunks, and shared by devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from b2txt_jax.model.gru.scan import gru_recurrence
from b2txt_jax.model.gru.wide import wide_recurrence

FRAMES, ROWS, UNITS = 11, 4, 8


def problem(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((FRAMES, ROWS, 3, UNITS), (ROWS, UNITS), (3, UNITS, UNITS), (3, UNITS))
    return [jnp.asarray(rng.normal(size=shape, scale=0.7), jnp.float32) for shape in shapes]


def plain(projected, h0, weight, bias):
    flat = (
        projected.reshape(FRAMES, ROWS, 3 * UNITS),
        h0,
        weight.reshape(3 * UNITS, UNITS),
        bias.reshape(-1),
    )
    return gru_recurrence(*flat, jnp.dtype("float32"))


def loss(run):
    """Weighs every frame apart, and the last state where there is one."""

    def value(*arguments):
        states = run(*arguments)
        weights = jnp.arange(1.0, FRAMES * ROWS * UNITS + 1).reshape(FRAMES, ROWS, UNITS)
        return (jnp.sin(weights) * states).sum()

    return value


@pytest.mark.parametrize("chunk", [0, 1, 4, 11, 50])
def test_states_and_gradients_are_those_of_the_plain_recurrence(chunk):
    arguments = problem()

    def wide(*arguments):
        return wide_recurrence(*arguments, jnp.dtype("float32"), chunk)[0]

    np.testing.assert_allclose(jax.jit(wide)(*arguments), plain(*arguments), atol=2e-6)
    ours = jax.jit(jax.grad(loss(wide), (0, 1, 2, 3)))(*arguments)
    theirs = jax.jit(jax.grad(loss(plain), (0, 1, 2, 3)))(*arguments)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_the_last_state_is_carried_with_a_gradient():
    """Two halves, one after the other, are the whole."""
    projected, h0, weight, bias = problem()

    def halves(projected, h0, weight, bias):
        first, last = wide_recurrence(projected[:5], h0, weight, bias, jnp.dtype("float32"))
        second, _ = wide_recurrence(projected[5:], last, weight, bias, jnp.dtype("float32"))
        return jnp.concatenate([first, second])

    ours = jax.jit(jax.grad(loss(halves), (0, 1, 2, 3)))(projected, h0, weight, bias)
    theirs = jax.jit(jax.grad(loss(plain), (0, 1, 2, 3)))(projected, h0, weight, bias)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_bfloat16_carries_the_state_in_float32():
    projected, h0, weight, bias = problem()
    states, last = wide_recurrence(projected, h0, weight, bias, jnp.dtype("bfloat16"))
    assert states.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    np.testing.assert_array_equal(states[-1], last.astype(jnp.bfloat16))
    assert (np.asarray(last) != np.asarray(states[-1], np.float32)).any()
    exact = wide_recurrence(projected, h0, weight, bias, jnp.dtype("float32"))[0]
    np.testing.assert_allclose(np.asarray(states, np.float32), exact, atol=0.03)


SHARED = """
import jax, jax.numpy as jnp, numpy as np, sys
sys.path.insert(0, {tests!r})
from test_gru_wide import loss, problem
from b2txt_jax.model.gru.wide import wide_recurrence
from b2txt_jax.training.sharding import make_mesh
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = make_mesh(4)  # 2 x 4 of 8 devices
places = [P(None, "data", None, "model"), P("data", "model"), P(None, "model"), P(None, "model")]
placed = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(problem(), places)]
alone = jax.grad(loss(lambda *a: wide_recurrence(*a, jnp.dtype("float32"))[0]), (0, 1, 2, 3))
expected = jax.jit(alone)(*problem())
for chunk in (0, 3):
    def wide(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return wide_recurrence(*arguments, jnp.dtype("float32"), chunk)[0]
    program = jax.jit(jax.grad(loss(wide), (0, 1, 2, 3))).lower(*placed).compile()
    text = program.as_text()
    assert "all-gather" in text, "the state is gathered"
    shared = [np.asarray(a) for a in program(*placed)]
    for one, other in zip(shared, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    weight = program.output_shardings[2]
    assert weight.shard_shape((3, 8, 8)) == (3, 2, 8), weight
"""


@pytest.mark.slow
def test_eight_devices_that_share_units_and_rows_give_what_one_gives():
    program = SHARED.format(tests=str(Path(__file__).parent))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
