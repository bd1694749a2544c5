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
    counts = [jnp.broadcast_to(c.astype(jnp.uint32), shape) for c in (label, channel)]

    def primitive(first: Array, second: Array, *counts: Array) -> tuple[Array, Array]:
        of_shape = (jnp.broadcast_to(one, shape) for one in (first, second))
        one, two = threefry2x32_p.bind(*of_shape, *counts)
        return one, two

    one, two = jax.lax.platform_dependent(
        keys[0], keys[1], *counts, cpu=_threefry, default=primitive
    )
    return one, two


_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def _threefry(first: Array, second: Array, one: Array, two: Array) -> tuple[Array, Array]:
    """Return what JAX's primitive returns, Threefry-2x32 of 20 rounds (Salmon et al. 2011).

    On a CPU the primitive is a loop that writes and reads five arrays in each of its iterations.
    Written out, it becomes one pass over the data: a tenth of the time. The barrier keeps it from
    being computed anew for every use of its two results.
    """
    keys = first, second, first ^ second ^ jnp.uint32(0x1BD11BDA)
    one, two = one + keys[0], two + keys[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            one += two
            two = one ^ (two << jnp.uint32(bits) | two >> jnp.uint32(32 - bits))
        one += keys[(group + 1) % 3]
        two += keys[(group + 2) % 3] + jnp.uint32(group + 1)
    one, two = jax.lax.optimization_barrier((one, two))
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
