"""A stack of GRU layers as one loop: at each step every layer computes the frame that the layer
below has just finished.

Layer after layer, a loop over P frames runs once per layer, and each of its products is too small
to fill a GPU. Along the wavefront one loop of P + L - 1 steps computes L frames at once, frame
s - l of layer l in step s. Equations, gate order and the trials of a row are those of scan.py, and
so are the saved gates and the weights' gradients, which stay outside the loop. A step has one
batched product: that of every layer but the first with the layer below, and that of every layer
with its own last state.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from b2txt_jax.model.gru.scan import at_begins
from b2txt_jax.model.product import over_rows


class Stack(NamedTuple):
    """Parameters of L layers, float32."""

    weight_ih: jax.Array
    """Input weights of all layers but the first, [L - 1, 3H, H]."""
    bias_ih: jax.Array
    """[L - 1, 3H]."""
    weight_hh: jax.Array
    """[L, 3H, H]."""
    bias_hh: jax.Array
    """[L, 3H]."""


def wavefront(
    projected: jax.Array,
    h0: jax.Array,
    stack: Stack,
    dtype: jnp.dtype,
    kept: jax.Array | None = None,
    scale: float = 1.0,
    begins: jax.Array | None = None,
) -> jax.Array:
    """Run all layers over time, time first. Values and gradients are those of layer after layer.

    Args:
      projected: input projections of the first layer with its bias, [P, B, 3H].
      h0: first state of every layer, float32 [B, H].
      stack: the layers' parameters.
      dtype: of the products' operands and of the result. Gates and states stay float32.
      kept: states that a layer passes on to the next, bool [P, L - 1, B, H]: dropout. None: all.
      scale: what the kept ones are multiplied by.
      begins: frames at which a trial begins, from `h0`, bool [P, B]. None: one trial a row.

    Returns:
      States of the last layer after each frame, [P, B, H] of `dtype`.
    """
    return _wavefront(projected, h0, stack, kept, begins, jnp.dtype(dtype), scale)


def _products(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Multiply layer by layer: x [L, B, I], weight [L, O, I] -> float32 [L, B, O]."""
    return jnp.einsum("lbi,loi->lbo", x.astype(dtype), weight, preferred_element_type=jnp.float32)


def _skewed(values: jax.Array, first: int) -> jax.Array:
    """Shift what layer `first` + l gets at each frame by its steps: [P, L', ...] ->
    [P + first + L' - 1, L', ...]."""
    layers = values.shape[1]

    def shifted(one: int) -> jax.Array:
        around = ((first + one, layers - 1 - one), *[(0, 0)] * (values.ndim - 2))
        return jnp.pad(values[:, one], around)

    return jnp.stack([shifted(one) for one in range(layers)], axis=1)


def _inputs(
    frames: int, layers: int, kept: jax.Array | None, begins: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Return by step: which layers are at a frame [S, L, 1, 1], the kept states [S, L - 1, B, H],
    and where trials begin [S, L, B]."""
    frame = jnp.arange(frames + layers - 1)[:, None] - jnp.arange(layers)
    there = ((frame >= 0) & (frame < frames))[..., None, None]
    if begins is not None:
        begins = _skewed(jnp.repeat(begins[:, None], layers, axis=1), 0)
    return there, None if kept is None else _skewed(kept, 1), begins


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _wavefront(
    projected: jax.Array,
    h0: jax.Array,
    stack: Stack,
    kept: jax.Array | None,
    begins: jax.Array | None,
    dtype: jnp.dtype,
    scale: float,
) -> jax.Array:
    return _run(projected, h0, stack, kept, begins, dtype, scale, save=False)[0]


def _run(
    projected: jax.Array,
    h0: jax.Array,
    stack: Stack,
    kept: jax.Array | None,
    begins: jax.Array | None,
    dtype: jnp.dtype,
    scale: float,
    save: bool,
) -> tuple[jax.Array, jax.Array]:
    """Return the last layer's states, and with `save` every layer's states and gates by step,
    [S, 5, L, B, H]: after it, r, z, n, recurrent part of n."""
    layers, frames = len(stack.weight_hh), len(projected)
    weights = jnp.concatenate([stack.weight_ih, stack.weight_hh]).astype(dtype)
    biases = jnp.concatenate([stack.bias_ih, stack.bias_hh])[:, None]
    there, kept, begins = _inputs(frames, layers, kept, begins)
    x = jnp.pad(projected, ((0, layers - 1), (0, 0), (0, 0)))

    def step(h: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        x, at_frame, kept, new = inputs
        below = h[:-1] if kept is None else jnp.where(kept, h[:-1] * scale, 0)
        before = at_begins(new, h0, h)
        gates = _products(jnp.concatenate([below, before]), weights, dtype) + biases
        gates_x = jnp.concatenate([x[None].astype(jnp.float32), gates[: layers - 1]])
        gates_h = gates[layers - 1 :]
        x_r, x_z, x_n = jnp.split(gates_x, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(gates_h, 3, axis=-1)
        r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
        after = jnp.where(at_frame, (1 - z) * n + z * before, h)
        # One array: a GPU starts a kernel for each that a loop fills.
        saved = jnp.stack([after, r, z, n, h_n]) if save else after[-1]
        return after, saved.astype(dtype)

    first = jnp.broadcast_to(h0, (layers, *h0.shape))
    saved = jax.lax.scan(step, first, (x, there, kept, begins))[1]
    states = saved[layers - 1 :]
    return states[:, 0, -1] if save else states, saved


def _forward(
    projected: jax.Array,
    h0: jax.Array,
    stack: Stack,
    kept: jax.Array | None,
    begins: jax.Array | None,
    dtype: jnp.dtype,
    scale: float,
) -> tuple[jax.Array, tuple[Any, ...]]:
    states, saved = _run(projected, h0, stack, kept, begins, dtype, scale, save=True)
    return states, (saved, h0, stack, kept, begins, projected[:0])


def _backward(
    dtype: jnp.dtype, scale: float, residuals: tuple[Any, ...], d_states: jax.Array
) -> tuple[Any, ...]:
    saved, h0, stack, kept, begins, projected_like = residuals
    steps, _, layers, rows, hidden = saved.shape
    frames = steps - layers + 1
    there, kept, begins = _inputs(frames, layers, kept, begins)
    first = jnp.broadcast_to(h0.astype(dtype), (1, layers, rows, hidden))
    passed = jnp.concatenate([first, saved[:-1, 0]])
    before = at_begins(begins, h0.astype(dtype), passed)
    below = passed[:, :-1]
    if kept is not None:
        below = jnp.where(kept, below * scale, 0).astype(dtype)
    weights = jnp.concatenate([stack.weight_ih, stack.weight_hh]).swapaxes(1, 2).astype(dtype)
    d_last = jnp.pad(d_states, ((layers - 1, 0), (0, 0), (0, 0)))

    def recurrent_part(d_gates: jax.Array) -> jax.Array:
        return jnp.concatenate([d_gates[..., : 2 * hidden], d_gates[..., 3 * hidden :]], axis=-1)

    def step(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
        d_h, d_above, d_first = carry
        d_out, at_frame, kept, new, h, saved_t = inputs
        h = h.astype(jnp.float32)
        _, r_t, z_t, n_t, h_n_t = saved_t.astype(jnp.float32)
        d = d_h + jnp.concatenate([d_above, d_out[None].astype(jnp.float32)])
        # A layer that is not at a frame passes on what it got.
        waiting, d = jnp.where(at_frame, 0, d), jnp.where(at_frame, d, 0)
        d_n = d * (1 - z_t) * (1 - n_t * n_t)
        d_z = d * (h - n_t) * z_t * (1 - z_t)
        d_r = d_n * h_n_t * r_t * (1 - r_t)
        d_gates = jnp.concatenate([d_r, d_z, d_n, d_n * r_t], axis=-1).astype(dtype)
        both = jnp.concatenate([d_gates[1:, :, : 3 * hidden], recurrent_part(d_gates)])
        d_below, d_own = jnp.split(_products(both, weights, dtype), [layers - 1])
        d_before = d * z_t + d_own
        if new is not None:
            nothing = jnp.zeros_like(d_before)
            d_first = d_first + at_begins(new, d_before, nothing).sum(0)
            d_before = at_begins(new, nothing, d_before)
        if kept is not None:
            d_below = jnp.where(kept, d_below * scale, 0)
        return (d_before + waiting, d_below, d_first), d_gates

    zero = jnp.zeros((layers, rows, hidden), jnp.float32)
    inputs = d_last, there, kept, begins, before, saved
    (d_h, _, d_first), d_all = jax.lax.scan(step, (zero, zero[1:], zero[0]), inputs, reverse=True)
    d_gates, d_recurrent = d_all[..., : 3 * hidden], recurrent_part(d_all)

    d_stack = Stack(
        weight_ih=over_rows("slbo,slbh->loh", d_gates[:, 1:], below, dtype),
        bias_ih=d_gates[:, 1:].sum((0, 2), dtype=jnp.float32),
        weight_hh=over_rows("slbo,slbh->loh", d_recurrent, before, dtype),
        bias_hh=d_recurrent.sum((0, 2), dtype=jnp.float32),
    )
    d_projected = d_gates[:frames, 0].astype(projected_like.dtype)
    return d_projected, d_h.sum(0) + d_first, d_stack, None, None


_wavefront.defvjp(_forward, _backward)
