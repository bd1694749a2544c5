"""Dropout with few random numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero values with probability `rate` and scale the others. The identity without a key.

    One random word of 32 bits serves two channels, half the width apart: random numbers are a
    tenth of a step. `rate` is rounded to 1/65536.
    """
    if key is None or rate == 0:
        return x
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 2)))
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., : x.shape[-1]]
    dropped = round(rate * 65536)
    return jnp.where(halves >= dropped, x * (65536 / (65536 - dropped)), 0).astype(x.dtype)
