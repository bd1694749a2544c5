"""The recurrence of one GRU layer, with PyTorch's equations and a backward pass of its own.

    r = sigmoid(x_r + W_hr h + b_hr)     z = sigmoid(x_z + W_hz h + b_hz)
    n = tanh(x_n + r * (W_hn h + b_hn))  h' = (1 - z) * n + z * h

Gate order r, z, n (Cho et al. 2014, torch.nn.GRU). The input projection x_r, x_z, x_n is one large
product outside the loop. The backward pass keeps the gates and leaves the weights' gradient out of
the loop: one large product over all frames instead of one small one per frame.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from b2txt_jax.model.product import over_rows, recurrent, transposed


def _gates(
    x: jax.Array, h: jax.Array, weight: jax.Array, bias: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """Compute one frame: projected input x [B, 3H], state h [B, H] -> r, z, n, W_hn h + b_hn, each
    float32 [B, H]."""
    gates = recurrent(h, weight, dtype) + bias
    x_r, x_z, x_n = jnp.split(x.astype(jnp.float32), 3, axis=-1)
    h_r, h_z, h_n = jnp.split(gates, 3, axis=-1)
    r = jax.nn.sigmoid(x_r + h_r)
    z = jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * h_n)
    return r, z, n, h_n


def at_begins(begins: jax.Array | None, first: jax.Array, h: jax.Array) -> jax.Array:
    """Return `first` in the rows where a trial begins, bool [..., B], and `h` in the others."""
    return h if begins is None else jnp.where(begins[..., None], first, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def gru_recurrence(
    projected: jax.Array,
    h0: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    dtype: jnp.dtype,
    begins: jax.Array | None = None,
) -> jax.Array:
    """Run the recurrence over time, time first.

    Args:
      projected: input projections with the input bias, [P, B, 3H].
      h0: first state, float32 [B, H].
      weight: recurrent weight, PyTorch's `weight_hh`, float32 [3H, H].
      bias: recurrent bias, float32 [3H].
      dtype: of the recurrent products' operands and of the result. Gates and state stay float32.
      begins: frames at which a trial begins, from `h0`, bool [P, B]. None: one trial a row.

    Returns:
      States after each frame, [P, B, H] of `dtype`.
    """

    def step(
        h: jax.Array, frame: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        x, new = frame
        h = at_begins(new, h0, h)
        _, z, n, _ = _gates(x, h, weight, bias, dtype)
        h = (1 - z) * n + z * h
        return h, h.astype(dtype)

    return jax.lax.scan(step, h0, (projected, begins))[1]


def carried_recurrence(
    projected: jax.Array, h0: jax.Array, weight: jax.Array, bias: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence over the few frames of a stream's chunk, without a backward pass.

    Returns:
      States after each frame, [P, B, H] of `dtype`, and the last one, float32 [B, H].
    """

    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, z, n, _ = _gates(x, h, weight, bias, dtype)
        h = (1 - z) * n + z * h
        return h, h.astype(dtype)

    last, states = jax.lax.scan(step, h0.astype(jnp.float32), projected)
    return states, last


def _forward(
    projected: jax.Array,
    h0: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    dtype: jnp.dtype,
    begins: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    def step(
        h: jax.Array, frame: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        x, new = frame
        h = at_begins(new, h0, h)
        r, z, n, h_n = _gates(x, h, weight, bias, dtype)
        after = (1 - z) * n + z * h
        return after, tuple(value.astype(dtype) for value in (after, r, z, n, h_n))

    states, r, z, n, h_n = jax.lax.scan(step, h0, (projected, begins))[1]
    return states, (states, r, z, n, h_n, h0, weight, projected[:0], begins)


def _backward(
    dtype: jnp.dtype, saved: tuple[Any, ...], d_states: jax.Array
) -> tuple[jax.Array | None, ...]:
    states, r, z, n, h_n, h0, weight, projected_like, begins = saved
    first = h0.astype(dtype)
    before = at_begins(begins, first, jnp.concatenate([first[None], states[:-1]]))
    weight_t = transposed(weight.astype(dtype))

    def step(
        carry: tuple[jax.Array, jax.Array], frame: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        d_h, d_first = carry
        new, d_out, *values = frame
        h, r_t, z_t, n_t, h_n_t = (value.astype(jnp.float32) for value in values)
        d_h = d_h + d_out.astype(jnp.float32)
        d_n = d_h * (1 - z_t) * (1 - n_t * n_t)
        d_z = d_h * (h - n_t) * z_t * (1 - z_t)
        d_r = d_n * h_n_t * r_t * (1 - r_t)
        d_recurrent = jnp.concatenate([d_r, d_z, d_n * r_t], axis=-1)
        d_h = d_h * z_t + recurrent(d_recurrent, weight_t, dtype)
        if new is not None:
            d_first = at_begins(new, d_first + d_h, d_first)
            d_h = at_begins(new, jnp.zeros_like(d_h), d_h)
        return (d_h, d_first), (d_n.astype(dtype), d_recurrent.astype(dtype))

    zero = jnp.zeros_like(h0)
    (d_h0, d_first), (d_n, d_recurrent) = jax.lax.scan(
        step, (zero, zero), (begins, d_states, before, r, z, n, h_n), reverse=True
    )
    hidden = h0.shape[-1]
    d_projected = jnp.concatenate([d_recurrent[..., : 2 * hidden], d_n], axis=-1)
    flat = d_recurrent.reshape(-1, 3 * hidden)
    d_weight = over_rows("nk,nh->kh", flat, before.reshape(-1, hidden), dtype)
    d_bias = flat.sum(0, dtype=jnp.float32)
    d_projected = d_projected.astype(projected_like.dtype)
    return d_projected, d_h0 + d_first, d_weight, d_bias, None


gru_recurrence.defvjp(_forward, _backward)
