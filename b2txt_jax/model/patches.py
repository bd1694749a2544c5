"""Patches: neighbouring bins stacked into one frame, and the projection that follows them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from b2txt_jax.model import toom_cook
from b2txt_jax.model.interface import Bins
from b2txt_jax.model.mesh import data_devices, devices_mesh
from b2txt_jax.model.product import gradient_dtype, over_rows, recurrent

_MULTIPLIED_FRAMES = 8
"""Frames up to which a product is used. For the few of a stream's chunk a convolution on a CPU
copies the whole weight into another order first."""
_CONVOLVED_ROWS = 8
"""Rows per device from which on the features' gradient is a convolution."""


def frame_count(bins: Bins, size: int, stride: int) -> Bins:
    """Return the frames that `bins` bins give: (bins - size) // stride + 1, and 0 for less than a
    patch.

    >>> frame_count(1000, 14, 4)
    247
    """
    frames = (bins - size) // stride + 1
    return max(frames, 0) if isinstance(frames, int) else jnp.maximum(frames, 0)


def patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Stack `size` bins every `stride` bins: [B, T, D] -> [B, (T - size) // stride + 1,
    size * D]."""
    count = (x.shape[1] - size) // stride + 1
    bins = jnp.arange(count)[:, None] * stride + jnp.arange(size)
    return x[:, bins].reshape(x.shape[0], count, size * x.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project_patches(
    x: jax.Array, weight: jax.Array, size: int, stride: int, dtype: jnp.dtype
) -> jax.Array:
    """Compute `patches(x, size, stride) @ weight.T`.

    x [B, T, D], weight [K, size * D] -> float32 [B, P, K].

    One strided convolution: the patches, 3.5 times the features at 14 bins every 4, never exist in
    memory. Operands are cast to `dtype`, forward and backward. Sums are float32. Of many frames in
    float32 a CPU computes it with half the multiplications. On an NVIDIA GPU the patches do exist:
    its library has no convolution of bfloat16 with float32 sums, and XLA takes TF32 ones, 8.2
    of the 28 ms of a step on an H200 (64 rows of 1,000 bins).
    """
    count = (x.shape[1] - size) // stride + 1
    if x.shape[0] * count <= _MULTIPLIED_FRAMES:
        frames = patches(x, size, stride).reshape(-1, weight.shape[1])
        return recurrent(frames, weight, dtype).reshape(x.shape[0], count, -1)

    def convolved(x: jax.Array, weight: jax.Array) -> jax.Array:
        kernel = _kernel(x, weight, size, dtype)
        return _convolve(x.astype(dtype), kernel, ("NTC", "OTI", "NTC"), window_strides=(stride,))

    ways: dict[str, Callable[..., jax.Array]] = {
        "cuda": functools.partial(multiplied, size=size, stride=stride, dtype=dtype)
    }
    if _in_fewer_products(x, size, stride, dtype):
        ways["cpu"] = functools.partial(toom_cook.project, size=size, stride=stride)
    result: jax.Array = jax.lax.platform_dependent(x, weight, **ways, default=convolved)
    return result


def _in_fewer_products(x: jax.Array, size: int, stride: int, dtype: jnp.dtype) -> bool:
    """Return whether a CPU saves multiplications with these features [B, T, D]."""
    frames = x.shape[0] * ((x.shape[1] - size) // stride + 1)
    float32 = x.dtype == dtype == jnp.float32
    return float32 and toom_cook.pays(frames, size, stride)


def _convolve(
    lhs: jax.Array, rhs: jax.Array, axes: tuple[str, str, str], **settings: Any
) -> jax.Array:
    settings = {
        "window_strides": (1,),
        "padding": [(0, 0)],
        "preferred_element_type": jnp.float32,
        **settings,
    }
    return jax.lax.conv_general_dilated(lhs, rhs, dimension_numbers=axes, **settings)


def _kernel(x: jax.Array, weight: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """Separate the bins of a weight: [K, size * D] -> [K, size, D]."""
    return weight.reshape(weight.shape[0], size, x.shape[2]).astype(dtype)


def _forward(
    x: jax.Array, weight: jax.Array, size: int, stride: int, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return project_patches(x, weight, size, stride, dtype), (x.astype(dtype), weight, x[:0])


def _backward(
    size: int, stride: int, dtype: jnp.dtype, saved: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight, x_like = saved
    convolved = functools.partial(_convolved_gradients, size=size, stride=stride, dtype=dtype)
    ways: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
        "cuda": functools.partial(multiplied_gradients, size=size, stride=stride, dtype=dtype)
    }
    if _in_fewer_products(x, size, stride, dtype):
        ways["cpu"] = functools.partial(toom_cook.gradients, size=size, stride=stride)
    d_x, d_weight = jax.lax.platform_dependent(x, weight, cotangent, **ways, default=convolved)
    # Laid out once: else clipping and each moment of the optimizer would read it across the grain.
    d_weight = jax.lax.optimization_barrier(d_weight)
    return d_x.astype(x_like.dtype), d_weight


def _convolved_gradients(
    x: jax.Array, weight: jax.Array, cotangent: jax.Array, size: int, stride: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    cotangent = cotangent.astype(dtype)
    unused = (x.shape[1] - size) % stride  # bins after the last patch
    # Each is again one convolution (Dumoulin and Visin 2016, section 4): over the frames for the
    # weight, over the spread-out frames with the kernel reversed for the features. Few rows leave
    # most of a TPU's product unit idle in the latter.
    d_weight = _convolve(
        x,
        cotangent,
        ("CTN", "ITO", "CTN"),
        padding=[(0, -unused)],
        rhs_dilation=(stride,),
        preferred_element_type=gradient_dtype(dtype),
    )
    if x.shape[0] // data_devices(devices_mesh()) < _CONVOLVED_ROWS:
        d_x = _overlapping(cotangent, weight.astype(dtype), x.shape, size, stride)
    else:
        d_x = _convolve(
            cotangent,
            _kernel(x, weight, size, dtype)[:, ::-1],
            ("NTC", "ITO", "NTC"),
            padding=[(size - 1, size - 1 + unused)],
            lhs_dilation=(stride,),
        )
    return d_x, d_weight.reshape(weight.shape).astype(jnp.float32)


def multiplied(
    x: jax.Array, weight: jax.Array, size: int, stride: int, dtype: jnp.dtype
) -> jax.Array:
    """Compute `project_patches` as one product of patches that exist."""
    frames, weight = patches(x.astype(dtype), size, stride), weight.astype(dtype)
    return jnp.einsum("bpi,ki->bpk", frames, weight, preferred_element_type=jnp.float32)


def multiplied_gradients(
    x: jax.Array, weight: jax.Array, cotangent: jax.Array, size: int, stride: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of `multiplied` by the features and, float32, by the weight."""
    cotangent = cotangent.astype(dtype)
    d_weight = over_rows("bpk,bpi->ki", cotangent, patches(x, size, stride), dtype)
    return _overlapping(cotangent, weight.astype(dtype), x.shape, size, stride), d_weight


def _overlapping(
    cotangent: jax.Array, weight: jax.Array, shape: tuple[int, ...], size: int, stride: int
) -> jax.Array:
    """Compute the features' gradient as one product, a patch for each frame, and add the patches
    where they overlap: [B, P, K], [K, size * D] -> float32 [B, T, D] of this shape."""
    rows, bins, width = shape
    frames, strides = cotangent.shape[1], -(-size // stride)  # strides: that a patch reaches over
    whole = jnp.pad(weight, ((0, 0), (0, (strides * stride - size) * width)))
    parts = jnp.einsum("bpk,ki->bpi", cotangent, whole, preferred_element_type=jnp.float32)
    parts = parts.reshape(rows, frames, strides, stride * width)
    added = sum(
        jnp.pad(parts[:, :, at], ((0, 0), (at, strides - 1 - at), (0, 0))) for at in range(strides)
    )
    added = jnp.asarray(added).reshape(rows, -1, width)[:, :bins]
    return jnp.pad(added, ((0, 0), (0, bins - added.shape[1]), (0, 0)))


project_patches.defvjp(_forward, _backward)
