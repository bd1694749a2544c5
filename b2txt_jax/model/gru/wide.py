"""The recurrence of a GRU layer that is too wide for one device: its units are shared by the mesh's
`model` axis (tensor parallel), and its memory over time can be traded for work.

Gates stand on an axis of their own, weight [3, H, H] (gates r, z, n), so that every device holds
all three gates of its units. A frame gathers the state of B x H values over `model`,
multiplies it with the device's rows of the weight, and keeps its units of the new state. The
backward pass sums the state's gradient over `model`. Equations and gate order are those of scan.py.

Without a mesh, or where `model` is one device, this is the plain recurrence. Streaming uses it too,
because it returns the last state in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from b2txt_jax.model.interface import DATA, MODEL
from b2txt_jax.model.product import over_rows

Frame = tuple[jax.Array, ...]


def spread(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain `x` to these axes of the mesh. Return it as it is where there is no such mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {DATA, MODEL} <= set(mesh.axis_names):
        return x
    placed: jax.Array = jax.lax.with_sharding_constraint(x, P(*axes))
    return placed


def wide_recurrence(
    projected: jax.Array,
    h0: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    dtype: jnp.dtype,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence over time, time first.

    Args:
      projected: input projections with the input bias, [P, B, 3, H].
      h0: first state, [B, H]. Taken as float32, like weight and bias.
      weight: recurrent weight, float32 [3, H, H].
      bias: recurrent bias, float32 [3, H].
      dtype: of the products' operands and of the states. Gates and the state carried stay float32.
      chunk: frames of 80 ms between the states that are kept for the backward pass, which runs
        each chunk forward once more. 0 keeps every frame's state and gates (Chen et al. 2016).

    Returns:
      States after each frame, [P, B, H] of `dtype`, and the last one, float32 [B, H].
    """
    frames = projected.shape[0]
    h0, weight, bias = (value.astype(jnp.float32) for value in (h0, weight, bias))
    if not 0 < chunk < frames:
        return _recurrence(projected, h0, weight, bias, dtype)
    whole = frames // chunk * chunk

    @jax.checkpoint
    def run(h: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        states, last = _recurrence(part, h, weight, bias, dtype)
        return last, states

    chunks = projected[:whole].reshape(-1, chunk, *projected.shape[1:])
    last, states = jax.lax.scan(run, h0, chunks)
    states = states.reshape(whole, *states.shape[2:])
    if whole < frames:
        last, rest = run(last, projected[whole:])
        states = jnp.concatenate([states, rest])
    return states, last


def _gates(
    x: jax.Array, h: jax.Array, weight: jax.Array, bias: jax.Array, dtype: jnp.dtype
) -> Frame:
    """Compute one frame: x [B, 3, H], h [B, H], weight [3, H, H] of `dtype` -> r, z, n,
    W_hn h + b_hn, each float32 [B, H]."""
    gathered = spread(h.astype(dtype), DATA, None)
    product = jnp.einsum("bh,gkh->bgk", gathered, weight, preferred_element_type=jnp.float32)
    gates = spread(product, DATA, None, MODEL) + bias
    x = x.astype(jnp.float32)
    r = jax.nn.sigmoid(x[:, 0] + gates[:, 0])
    z = jax.nn.sigmoid(x[:, 1] + gates[:, 1])
    n = jnp.tanh(x[:, 2] + r * gates[:, 2])
    return r, z, n, gates[:, 2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recurrence(
    projected: jax.Array, h0: jax.Array, weight: jax.Array, bias: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    cast = weight.astype(dtype)

    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, z, n, _ = _gates(x, h, cast, bias, dtype)
        h = spread((1 - z) * n + z * h, DATA, MODEL)
        return h, h.astype(dtype)

    last, states = jax.lax.scan(step, spread(h0, DATA, MODEL), projected)
    return states, last


def _forward(
    projected: jax.Array, h0: jax.Array, weight: jax.Array, bias: jax.Array, dtype: jnp.dtype
) -> tuple[tuple[jax.Array, jax.Array], Frame]:
    cast = weight.astype(dtype)

    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, Frame]:
        r, z, n, h_n = _gates(x, h, cast, bias, dtype)
        after = spread((1 - z) * n + z * h, DATA, MODEL)
        return after, tuple(value.astype(dtype) for value in (after, r, z, n, h_n))

    last, (states, *gates) = jax.lax.scan(step, spread(h0, DATA, MODEL), projected)
    return (states, last), (states, *gates, h0, weight, projected[:0])


def _backward(
    dtype: jnp.dtype, saved: Frame, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    states, r, z, n, h_n, h0, weight, projected_like = saved
    d_states, d_last = cotangents
    before = jnp.concatenate([h0[None].astype(dtype), states[:-1]])
    cast = weight.astype(dtype)

    def step(d_h: jax.Array, frame: Frame) -> tuple[jax.Array, Frame]:
        d_out, *values = frame
        h, r_t, z_t, n_t, h_n_t = (value.astype(jnp.float32) for value in values)
        d_h = d_h + d_out.astype(jnp.float32)
        d_n = d_h * (1 - z_t) * (1 - n_t * n_t)
        d_z = d_h * (h - n_t) * z_t * (1 - z_t)
        d_r = d_n * h_n_t * r_t * (1 - r_t)
        d_gates = jnp.stack([d_r, d_z, d_n * r_t], axis=1).astype(dtype)
        d_gates = spread(d_gates, DATA, None, MODEL)
        through = jnp.einsum("bgk,gkh->bh", d_gates, cast, preferred_element_type=jnp.float32)
        d_h = d_h * z_t + spread(through, DATA, MODEL)
        return d_h, (d_n.astype(dtype), d_gates)

    first = spread(d_last.astype(jnp.float32), DATA, MODEL)
    d_h0, (d_n, d_gates) = jax.lax.scan(step, first, (d_states, before, r, z, n, h_n), reverse=True)
    d_projected = jnp.concatenate([d_gates[:, :, :2], d_n[:, :, None]], axis=2)
    d_weight = over_rows("pbgk,pbh->gkh", d_gates, before, dtype)
    d_bias = d_gates.sum((0, 1), dtype=jnp.float32)
    return d_projected.astype(projected_like.dtype), d_h0, spread(d_weight, None, MODEL), d_bias


_recurrence.defvjp(_forward, _backward)
