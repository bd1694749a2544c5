"""Gaussian smoothing of features over time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from b2txt_jax.config import ConfigError, SignalConfig

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


def taps_of(signal: SignalConfig) -> tuple[tuple[float, ...], int]:
    """Return the configured kernel, the oldest bin's tap first, and how many bins it looks ahead.

    The one-sided kernel is the past half of the symmetric one, renormalised. For a std of 2 bins
    its taps are 0.046, 0.110, 0.206, 0.299 and 0.339.

    Raises:
      ConfigError: as `gaussian_taps`.
    """
    if signal.smooth_std == 0:
        return (1.0,), 0
    taps = gaussian_taps(signal.smooth_std, signal.smooth_size)
    ahead = len(taps) // 2
    if signal.smooth_kernel == "symmetric":
        return taps, ahead
    past = taps[: ahead + 1]
    return tuple(tap / sum(past) for tap in past), 0


def smooth_as(x: jax.Array, signal: SignalConfig, padding: str = "same") -> jax.Array:
    """Smooth over time with the configured kernel: [B, T, D] -> as `smooth`."""
    taps, ahead = taps_of(signal)
    return x if taps == (1.0,) else _weighted(x, taps, ahead, padding)


def smooth(x: jax.Array, std: float, size: int, padding: str = "same") -> jax.Array:
    """Smooth over time: [B, T, D] -> [B, T, D] ('same') or [B, T - taps + 1, D] ('valid')."""
    taps = gaussian_taps(std, size)
    return _weighted(x, taps, len(taps) // 2, padding)


def _weighted(x: jax.Array, taps: tuple[float, ...], ahead: int, padding: str) -> jax.Array:
    """Return the sum of shifted copies: the compiler fuses it into one pass over the data, which a
    depthwise convolution is not."""
    if padding == "same":
        x = jnp.pad(x, ((0, 0), (len(taps) - 1 - ahead, ahead), (0, 0)))
    length = x.shape[1] - len(taps) + 1
    return sum(
        (jnp.asarray(tap, x.dtype) * x[:, i : i + length] for i, tap in enumerate(taps)),
        start=jnp.zeros((), x.dtype),
    )
