"""Patches projected with half the products, for a CPU, whose arithmetic bounds a training step.

A patch of `size` bins every `stride` bins is a filter of r = ceil(size / stride) taps over groups
of `stride` bins. The algorithm of Toom and Cook takes filter and groups as polynomials, evaluates
them at seven points, multiplies there, and interpolates (Winograd 1980, Lavin and Gray 2016).
Seven products give 8 - r frames, for which the definition needs r (8 - r). For the published
patches of 14 bins every 4 that is half of the multiplications.

The sums before and after the products cost digits: in float32 the error is about six times that of
the definition. A TPU or GPU multiplies in bfloat16, which has none to spare.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_POINTS = tuple(Fraction(point) for point in ("0", "1", "-1", "2", "-2", "-1/2"))
"""And infinity. Of small fractions, those with the least error of a random filter."""
_PRODUCTS = len(_POINTS) + 1
_FEWEST_FRAMES = 1024
"""For fewer the transform of the weight costs more than it saves."""


class _Transforms(NamedTuple):
    """Those of r taps: frames = output @ ((taps @ weights) * (groups @ groups of a tile))."""

    output: np.ndarray
    """[8 - r, 7]."""
    taps: np.ndarray
    """[7, r]."""
    groups: np.ndarray
    """[7, 7]."""


def pays(frames: int, size: int, stride: int) -> bool:
    """Return whether this needs fewer multiplications for so many frames of a batch."""
    taps = -(-size // stride)
    return frames >= _FEWEST_FRAMES and taps > 1 and _PRODUCTS * stride < (8 - taps) * size


@functools.cache
def transforms(taps: int) -> _Transforms:
    """Return the matrices for filters of so many taps, 1 to 7 (Lavin and Gray 2016, section 4)."""
    frames = _PRODUCTS + 1 - taps
    output, of_taps, groups = (
        np.zeros(shape) for shape in ((frames, _PRODUCTS), (_PRODUCTS, taps), (_PRODUCTS,) * 2)
    )
    for at, point in enumerate(_POINTS):
        others = [other for other in _POINTS if other != point]
        scale = math.prod(point - other for other in others)
        output[:, at] = [float(point**k) for k in range(frames)]
        of_taps[at] = [float(point**k / scale) for k in range(taps)]
        groups[at, :-1] = _coefficients(others)
    # At infinity a polynomial is its leading coefficient.
    output[-1, -1] = of_taps[-1, -1] = 1
    groups[-1] = _coefficients(_POINTS)
    return _Transforms(output, of_taps, groups)


def _coefficients(roots: Iterable[Fraction]) -> list[float]:
    """Return those of the polynomial with these roots, the constant first."""
    product = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *product], [*(root * one for one in product), Fraction(0)]
        product = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return [float(one) for one in product]


def project(x: jax.Array, weight: jax.Array, size: int, stride: int) -> jax.Array:
    """Compute `patches(x, size, stride) @ weight.T`: x [B, T, D], weight [K, size * D] -> [B, P, K]
    of their dtype."""
    taps = -(-size // stride)
    frames = (x.shape[1] - size) // stride + 1
    evaluated = _evaluated_taps(weight, size, stride, x.shape[2])
    products = [
        groups @ tap.T
        for groups, tap in zip(_evaluated_groups(x, size, stride), evaluated, strict=True)
    ]
    tiles = _mixed(transforms(taps).output, products)
    return jnp.stack(tiles, 1).reshape(x.shape[0], -1, weight.shape[0])[:, :frames]


def gradients(
    x: jax.Array, weight: jax.Array, cotangent: jax.Array, size: int, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of x [B, T, D] and of weight [K, size * D] from that of the projection,
    [B, P, K]."""
    rows, bins, width = x.shape
    units, taps = weight.shape[0], -(-size // stride)
    at = transforms(taps)
    of_tile = at.output.shape[0]
    tiles = -(-cotangent.shape[1] // of_tile)
    padded = jnp.pad(cotangent, ((0, 0), (0, tiles * of_tile - cotangent.shape[1]), (0, 0)))
    padded = padded.reshape(rows * tiles, of_tile, units)
    products = _mixed(at.output.T, [padded[:, one] for one in range(of_tile)])

    # In the other order the products need no transpose after them, and take 1.8 times as long.
    of_taps = [
        groups.T @ product
        for groups, product in zip(_evaluated_groups(x, size, stride), products, strict=True)
    ]
    d_taps = jnp.stack([one.T for one in _mixed(at.taps.T, of_taps)], 1)
    d_weight = d_taps.reshape(units, -1)[:, : size * width]

    evaluated = _evaluated_taps(weight, size, stride, width)
    parts = _mixed(at.groups.T, [one @ tap for one, tap in zip(products, evaluated, strict=True)])
    return _added(parts, rows, of_tile, (bins, width)), d_weight


def _evaluated_groups(x: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """Return each tile's groups of bins at each point, seven times [B * tiles, stride * D]."""
    rows, bins, width = x.shape
    taps = -(-size // stride)
    of_tile = _PRODUCTS + 1 - taps
    tiles = -(-((bins - size) // stride + 1) // of_tile)
    groups = tiles * of_tile + taps - 1
    x = jnp.pad(x, ((0, 0), (0, max(groups * stride - bins, 0)), (0, 0)))[:, : groups * stride]
    x = x.reshape(rows, groups, stride * width)
    of_tiles = [
        x[:, one : one + (tiles - 1) * of_tile + 1 : of_tile].reshape(rows * tiles, -1)
        for one in range(_PRODUCTS)
    ]
    return _mixed(transforms(taps).groups, of_tiles)


def _evaluated_taps(weight: jax.Array, size: int, stride: int, width: int) -> list[jax.Array]:
    """Return the filter at each point, seven times [K, stride * D]."""
    taps = -(-size // stride)
    whole = jnp.pad(weight, ((0, 0), (0, (taps * stride - size) * width)))
    whole = whole.reshape(-1, taps, stride * width)
    return _mixed(transforms(taps).taps, [whole[:, one] for one in range(taps)])


def _mixed(matrix: np.ndarray, values: list[jax.Array]) -> list[jax.Array]:
    """Return for each row of a matrix the sum of the values that it weighs."""
    return [
        jnp.asarray(
            sum(float(factor) * value for factor, value in zip(row, values, strict=True) if factor)
        )
        for row in matrix
    ]


def _added(parts: list[jax.Array], rows: int, of_tile: int, shape: tuple[int, int]) -> jax.Array:
    """Add the groups of bins where tiles overlap: seven of [B * tiles, stride * D] -> [B, T, D]."""
    parts = [part.reshape(rows, -1, part.shape[-1]) for part in parts]
    reach = -(-_PRODUCTS // of_tile)  # tiles that share a group
    columns = []
    for first in range(of_tile):
        own = parts[first::of_tile]
        padded = [jnp.pad(one, ((0, 0), (k, reach - 1 - k), (0, 0))) for k, one in enumerate(own)]
        columns.append(sum(padded))
    added = jnp.stack(columns, 2).reshape(rows, -1, shape[1])[:, : shape[0]]
    return jnp.pad(added, ((0, 0), (0, shape[0] - added.shape[1]), (0, 0)))
