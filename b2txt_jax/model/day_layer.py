"""The day layer: one linear map per recording day brings its features to a common space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from b2txt_jax.model.interface import MODEL, Rules
from b2txt_jax.model.product import contract, gradient_dtype

# 45 days of 512 x 512 are a quarter of a GRU's parameters; each row of a batch needs one day.
DAY_SHARDING: Rules = ((r"day/weight", P(None, None, MODEL)), (r"day/bias", P(None, MODEL)))
"""How devices share the day layers."""


def day_layer(
    x: jax.Array, day: jax.Array, weight: jax.Array, bias: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Return softsign(x @ weight[day] + bias[day]): x [B, T, D], day [B], weight [days, D, D], bias
    [days, D] -> [B, T, D].

    The product runs in `dtype` with float32 sums. The result has `dtype`.
    """
    # The rows' gradients are added in the dtype that they are taken in.
    chosen = weight.astype(gradient_dtype(dtype))[day]
    mixed = contract("btd,bdk->btk", x, chosen, dtype)
    return jax.nn.soft_sign(mixed + bias[day][:, None, :]).astype(dtype)


def day_change(
    x: jax.Array, day: jax.Array, weight: jax.Array, bias: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Return x + x @ weight[day] + bias[day], float32, with shapes as of `day_layer`.

    A day whose row is zeros gets x itself, bit for bit, in every dtype.
    """
    chosen = weight.astype(gradient_dtype(dtype))[day]
    return x + (contract("btd,bdk->btk", x, chosen, dtype) + bias[day][:, None, :])
