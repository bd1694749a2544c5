"""Matrix products in the compute dtype, forward and backward: operands are cast, sums are float32.

Automatic differentiation of a product with bfloat16 operands and a float32 result would run the
backward products in float32, at a fraction of a matrix unit's speed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp

_added_in: ContextVar[str] = ContextVar("added_in", default="float32")


@contextmanager
def gradients_added_in(dtype: jnp.dtype) -> Iterator[None]:
    """Let the devices that share a batch add their parts of weights' gradients in `dtype`, in what
    is traced inside. Each part is a float32 sum, rounded once."""
    token = _added_in.set(jnp.dtype(dtype).name)
    try:
        yield
    finally:
        _added_in.reset(token)


def gradient_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return in which dtype weights' gradients of products in `dtype` are added."""
    return max(jnp.dtype(dtype), jnp.dtype(_added_in.get()), key=lambda one: one.itemsize)


def over_rows(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return a weight's gradient, float32: the einsum of two operands that sums over the rows of a
    batch. See `gradients_added_in`."""
    kind = gradient_dtype(dtype)
    found = jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=kind)
    return found.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the einsum of two operands, float32: every index of one operand is in the other or in
    the result.

    The operands, and in the backward pass the cotangent, are cast to `dtype` first.
    """
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _forward(
    spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    kept = a.astype(dtype), b.astype(dtype), a[:0], b[:0]
    return contract(spec, a, b, dtype), kept


def _backward(
    spec: str, dtype: jnp.dtype, saved: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a, b, a_like, b_like = saved
    operands, out = spec.split("->")
    of_a, of_b = operands.split(",")
    d_a = contract(f"{out},{of_b}->{of_a}", cotangent, b, dtype)
    # A weight has no index of the rows.
    of_rows = contract if set(of_a) & set(of_b) & set(out) else over_rows
    d_b = of_rows(f"{of_a},{out}->{of_b}", a, cotangent, dtype)
    return d_a.astype(a_like.dtype), d_b.astype(b_like.dtype)


contract.defvjp(_forward, _backward)


def linear(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return x @ weight.T: x [X, Y, I], weight [O, I] as PyTorch keeps it -> float32 [X, Y, O]."""
    return contract("xyi,oi->xyo", x, weight, dtype)


def recurrent(state: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return state @ weight.T of one frame: state [B, I], weight [O, I] -> float32 [B, O].

    Not differentiable: for use inside loops with a backward pass of their own.
    """

    def columns(h: jax.Array, w: jax.Array) -> jax.Array:
        # With the few rows of a batch on the right, a CPU reads the weight in its own order: 1.2
        # to 2 times faster. The barrier keeps the compiler from undoing this.
        product = jnp.matmul(w, h.T, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(product).T

    def rows(h: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.matmul(h, w.T, preferred_element_type=jnp.float32)

    result: jax.Array = jax.lax.platform_dependent(
        state.astype(dtype), weight.astype(dtype), cpu=columns, default=rows
    )
    return result


def transposed(weight: jax.Array) -> jax.Array:
    """Return weight.T laid out anew, where a loop would otherwise read it against its order."""

    def copied(w: jax.Array) -> jax.Array:
        moved: jax.Array = jax.lax.optimization_barrier(w.T)
        return moved

    result: jax.Array = jax.lax.platform_dependent(weight, cpu=copied, default=jnp.transpose)
    return result
