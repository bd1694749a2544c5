"""Random matrices with orthonormal columns, also where a QR decomposition is out of reach."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

_QR_COLUMNS = 2048
"""Wider matrices are computed by products alone. A QR decomposition goes column by column: for 7168
columns the TPU compiler did not end within a quarter of an hour, and devices could not share it."""
_MARGIN = 1.05
"""Factor by which a wide Gaussian matrix's singular values may leave their limits."""


def orthogonal(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """Draw a matrix uniformly from those with orthonormal columns (Saxe et al. 2014, what
    `torch.nn.init.orthogonal_` draws), float32 [rows, columns], rows >= columns."""
    if columns <= _QR_COLUMNS:
        made: jax.Array = jax.nn.initializers.orthogonal()(key, (rows, columns), jnp.float32)
        return made
    return polar_factor(jax.random.normal(key, (rows, columns), jnp.float32))


def polar_factor(gaussian: jax.Array) -> jax.Array:
    """Return the orthogonal factor U of a Gaussian matrix G = U (G'G)^1/2, [rows, columns], rows
    well above columns.

    U is drawn uniformly, as the QR decomposition's Q with its signs mended: G and QG have the same
    distribution for every orthogonal Q. Found by Newton-Schulz iterations X <- X (3 - X'X) / 2
    (Higham 2008, Functions of Matrices, section 8.3), which need singular values in (0, sqrt 3).
    Those of G lie between sqrt(rows) - sqrt(columns) and sqrt(rows) + sqrt(columns) (Bai and Yin
    1993), which also bounds the number of iterations.
    """
    rows, columns = gaussian.shape
    most = _MARGIN * (math.sqrt(rows) + math.sqrt(columns))
    least = (math.sqrt(rows) - math.sqrt(columns)) / _MARGIN / most
    count = 1  # for the last digits
    while 1 - least > 1e-7:
        least = (3 * least - least**3) / 2
        count += 1
    highest = jax.lax.Precision.HIGHEST

    def iterate(_: int, x: jax.Array) -> jax.Array:
        squared = jnp.matmul(x.T, x, precision=highest)
        return 1.5 * x - 0.5 * jnp.matmul(x, squared, precision=highest)

    found: jax.Array = jax.lax.fori_loop(0, count, iterate, gaussian / most)
    return found
