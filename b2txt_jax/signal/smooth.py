"""Gaussian smoothing of features over time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from b2txt_jax.config import ConfigError

TAP_THRESHOLD = 0.01
"""Smaller taps are dropped before the kernel is renormalised (NEJM reference, section 4)."""


@functools.cache
def gaussian_taps(std: float, size: int) -> tuple[float, ...]:
    """Return the taps of the smoothing kernel, summing to 1. `std` and `size` in bins.

    The published code cuts a Gaussian at 4 std, normalises it, and keeps the taps above 0.01.

    Raises:
      ConfigError: the window is too small for the kernel, or no tap is above the threshold.
    """
    radius = int(4 * std + 0.5)
    if size < 2 * radius + 1:
        raise ConfigError(
            f"signal.smooth_size is {size} bins; a std of {std} bins needs at least "
            f"{2 * radius + 1}"
        )
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
    taps /= taps.sum()
    kept = taps[taps > TAP_THRESHOLD]
    if not len(kept):
        raise ConfigError(
            f"signal.smooth_std is {std} bins: all taps of so wide a kernel are below "
            f"{TAP_THRESHOLD} and would be dropped; needed less than 39"
        )
    return tuple((kept / kept.sum()).tolist())


def smooth(x: jax.Array, std: float, size: int, padding: str = "same") -> jax.Array:
    """Smooth over time: [B, T, D] -> [B, T, D] ('same') or [B, T - taps + 1, D] ('valid').

    A sum of shifted copies: the compiler fuses it into one pass over the data, which a depthwise
    convolution is not.
    """
    taps = gaussian_taps(std, size)
    if padding == "same":
        left = (len(taps) - 1) // 2
        x = jnp.pad(x, ((0, 0), (left, len(taps) - 1 - left), (0, 0)))
    length = x.shape[1] - len(taps) + 1
    return sum(
        (jnp.asarray(tap, x.dtype) * x[:, i : i + length] for i, tap in enumerate(taps)),
        start=jnp.zeros((), x.dtype),
    )
