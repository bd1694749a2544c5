"""Dropout with few random numbers, which depend on a frame's trial and its place there."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from b2txt_jax.segments import words


def dropout(x: Array, rate: float, key: Array | None, label: Array | None = None) -> Array:
    """Zero values with probability `rate` and scale the others. The identity without a key.

    Args:
      x: [..., C].
      rate: rounded to 1/65536.
      key: random key.
      label: of each frame (see segments.labels), broadcast to [...]. By default its position.
    """
    if key is None or rate == 0:
        return x
    if label is None:
        label = jnp.arange(math.prod(x.shape[:-1])).reshape(x.shape[:-1])
    drawn = quarters(key, label[..., None], jnp.arange(-(-x.shape[-1] // 4)), axis=-1)
    return dropped(x, rate, drawn[..., : x.shape[-1]])


def kept(channels: int, rate: float, key: Array, label: Array) -> Array:
    """Return which values dropout keeps: label [...] -> bool [..., channels]."""
    drawn = quarters(key, label[..., None], jnp.arange(-(-channels // 4)), axis=-1)
    return drawn[..., :channels] >= _least(rate)


def scale(rate: float) -> float:
    """Return the factor of what dropout keeps."""
    return 65536 / (65536 - _least(rate))


def quarters(key: Array, label: Array, channel: Array, axis: int) -> Array:
    """Return four random numbers below 65536 for each (label, channel), along `axis`: random
    numbers are a tenth of a step."""
    one, two = words(key, label, channel)
    parts = [one & 0xFFFF, one >> 16, two & 0xFFFF, two >> 16]
    return jnp.concatenate(parts, axis=axis)


def dropped(x: Array, rate: float, drawn: Array) -> Array:
    """Zero the values whose random number, below 65536, falls below `rate`."""
    return jnp.where(drawn >= _least(rate), x * scale(rate), 0).astype(x.dtype)


def _least(rate: float) -> int:
    """Return the least random number, below 65536, that is kept."""
    return round(rate * 65536)
