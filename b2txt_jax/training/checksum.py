"""Checksums of arrays, computed where the arrays live. Equal for any number of devices."""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
"""Unsigned type by the bytes of an element. 8 bytes become two elements."""


def checksums(tree: Any) -> dict[str, int]:
    """Return a 32-bit number per leaf, by its path such as `params/gru/h0`.

    One changed element always changes its leaf's number. Any other change is missed once in 4
    billion times. Only the numbers leave the devices, and each shape compiles once.
    With several hosts, all must call it.
    """
    # A program per shape, not one for all: moments have the shapes of their parameters.
    sums = {
        jax.tree_util.keystr(path, simple=True, separator="/"): _checksum_of(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def text_checksum(text: str) -> int:
    """Return the CRC-32 of a text."""
    return zlib.crc32(text.encode())


@jax.jit
def _checksum_of(leaf: jax.Array) -> jax.Array:
    """Return the sum, modulo 2^32, of every element's bits mixed with its position.

    The mixing is MurmurHash3's finalizer, which maps no two words to one. A sum does not depend on
    the order in which devices add.
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position + index * jnp.uint32(stride)
    mixed = bits ^ (position * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    return mixed.sum(dtype=jnp.uint32)
