"""Trials that share a row of a batch, one after another, and random draws that do not depend on it.

A draw is a function of (key, trial, place in the trial, channel). So a trial gets the same noise
and dropout alone, in a longer row, behind another trial, and on any number of devices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry2x32_p


class Segments(NamedTuple):
    """Where the trials of each row begin."""

    start: Array
    """int32 [B, S], first bin of each trial, ascending. The length of the row for no trial."""
    trial: Array
    """int32 [B, S], its number in the batch."""


def whole(rows: int) -> Segments:
    """Return the segments of rows of one trial each."""
    return Segments(jnp.zeros((rows, 1), jnp.int32), jnp.arange(rows)[:, None])


def owner(segments: Segments, length: int, stride: int = 1) -> Array:
    """Return the segment that each bin, or frame of `stride` bins, comes in or after: [B, length].

    Before the first it is the first.
    """
    at = stride * jnp.arange(length)[:, None]
    return jnp.maximum((at >= segments.start[:, None]).sum(-1) - 1, 0)


def spread(values: Array, index: Array) -> Array:
    """Repeat a value of each segment over its bins: [B, S, ...], [B, T] -> [B, T, ...].

    A chain of selections, since they fuse with what follows. A gather does not. For one segment the
    result is [B, 1, ...].
    """
    found = values[:, :1]
    for one in range(1, values.shape[1]):
        here = (index == one).reshape(*index.shape, *[1] * (values.ndim - 2))
        found = jnp.where(here, values[:, one : one + 1], found)
    return found


def places(segments: Segments, length: int, stride: int = 1) -> Array:
    """Return each bin's, or frame's, place in its trial, from 0: int32 [B, length]."""
    first = spread(segments.start // stride, owner(segments, length, stride))
    return jnp.arange(length) - first


def inside(segments: Segments | None, bins: Array, length: int) -> Array:
    """Return which bins belong to a trial: bins [B, S], or [B] without segments -> [B, length]."""
    if segments is None:
        return jnp.arange(length) < bins[:, None]
    return places(segments, length) < spread(bins, owner(segments, length))


def labels(segments: Segments, length: int, stride: int = 1) -> Array:
    """Return a number for each bin, or frame, that says its trial and place: uint32 [B, length]."""
    trial = spread(segments.trial, owner(segments, length, stride))
    place = places(segments, length, stride)
    return (trial.astype(jnp.uint32) << 16) ^ (place.astype(jnp.uint32) & 0xFFFF)


def words(key: Array, label: Array, channel: Array) -> tuple[Array, Array]:
    """Return two independent random words of 32 bits for each (label, channel), broadcast."""
    keys = jax.random.key_data(key)[..., :2].astype(jnp.uint32)
    shape = jnp.broadcast_shapes(label.shape, channel.shape)
    counts = (jnp.broadcast_to(c.astype(jnp.uint32), shape) for c in (label, channel))
    first, second = (jnp.broadcast_to(keys[i], shape) for i in range(2))
    one, two = threefry2x32_p.bind(first, second, *counts)
    return one, two


def normal(key: Array, label: Array, channels: int) -> Array:
    """Return standard normal draws for each label and channel: [...] -> float32 [..., channels]."""
    pair = words(key, label[..., None], jnp.arange(-(-channels // 2)))
    bits = jnp.concatenate(pair, axis=-1)[..., :channels]
    # 23 bits make a float in [1, 2), and then one in (-1, 1), as jax.random.normal has it.
    between = jax.lax.bitcast_convert_type((bits >> 9) | 0x3F800000, jnp.float32) - 1
    least = jnp.nextafter(jnp.float32(-1), jnp.float32(0))
    return jnp.sqrt(2).astype(jnp.float32) * jax.lax.erf_inv(
        jnp.maximum(least, between * (1 - least) + least)
    )
