"""The NEJM baseline decoder: day layer, patches, GRU stack, head. Modules hold parameters; the
maths is elsewhere.

Parameters have PyTorch's names and shapes within each part, so that weights cross without
transposing: `day.weight [days, D, D]`, `day.bias [days, D]`, `gru.weight_ih_lK [3H, I]`,
`gru.weight_hh_lK [3H, H]`, `gru.bias_ih_lK [3H]`, `gru.bias_hh_lK [3H]`, `head.weight [C, H]`,
`head.bias [C]`, `h0 [1, 1, H]`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from b2txt_jax.config import ModelConfig
from b2txt_jax.model.day_layer import day_layer
from b2txt_jax.model.gru.recurrence import recurrence
from b2txt_jax.model.gru.wide import wide_recurrence
from b2txt_jax.model.orthogonal import orthogonal
from b2txt_jax.model.patches import project_patches
from b2txt_jax.model.product import linear

Params = dict[str, Any]
"""Nested dict of float32 arrays; the pure form of the model's state."""

xavier = jax.nn.initializers.glorot_uniform(in_axis=-1, out_axis=-2)


def compute_dtype(model: ModelConfig) -> jnp.dtype:
    """The dtype of matrix products; 'auto' is bfloat16 on an accelerator and float32 on a CPU,
    where bfloat16 is slow."""
    name = model.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def patching(model: ModelConfig) -> tuple[int, int]:
    """(size, stride) of patches in bins; (1, 1) without patches."""
    return (model.patch_size, model.patch_stride) if model.patch_size else (1, 1)


def first_state(key: jax.Array, units: int) -> jax.Array:
    """A fresh h0 [1, 1, H]: Xavier as PyTorch counts it, fan-in H, fan-out H (its receptive field
    is the last axis)."""
    bound = math.sqrt(6 / (2 * units))
    return jax.random.uniform(key, (1, 1, units), jnp.float32, -bound, bound)


def stacked(h0: jax.Array, layers: int, rows: int) -> jax.Array:
    """h0 [1, 1, H] of any dtype for every layer and row, float32 [layers, B, H]."""
    return jnp.tile(h0.astype(jnp.float32), (layers, rows, 1))


def uniform(key: jax.Array, size: int, fan_in: int) -> jax.Array:
    """A fresh bias [size]: PyTorch's bound, 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, (size,), jnp.float32, -bound, bound)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes values with probability `rate` and scales the others; the identity without a key.

    One random word of 32 bits serves two channels, half the width apart: random numbers are a
    tenth of a step. `rate` is rounded to 1/65536.
    """
    if key is None or rate == 0:
        return x
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 2)))
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., : x.shape[-1]]
    dropped = round(rate * 65536)
    return jnp.where(halves >= dropped, x * (65536 / (65536 - dropped)), 0).astype(x.dtype)


class DayLayer(nnx.Module):
    """Input layers, the identity at first: one per day, or one that all days share."""

    def __init__(self, days: int, features: int):
        self.weight = nnx.Param(jnp.tile(jnp.eye(features), (days, 1, 1)))
        self.bias = nnx.Param(jnp.zeros((days, features)))

    def __call__(self, x: jax.Array, day: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """x [B, T, D], day [B] -> [B, T, D]."""
        weight = self.weight[...]
        day = day if weight.shape[0] > 1 else jnp.zeros_like(day)
        return day_layer(x, day, weight, self.bias[...], dtype)


class GRUStack(nnx.Module):
    """GRU layers over patches; the first projection and the patches are one strided convolution."""

    def __init__(self, model: ModelConfig, inputs: int, layers: int, key: jax.Array):
        """`inputs`: width of a patch."""
        self.model = model
        self.layers = layers
        units = model.units
        for layer in range(layers):
            keys = jax.random.split(jax.random.fold_in(key, layer), 4)
            parameters = {
                "weight_ih": xavier(keys[0], (3 * units, units if layer else inputs), jnp.float32),
                "weight_hh": orthogonal(keys[1], 3 * units, units),
                "bias_ih": uniform(keys[2], 3 * units, units),
                "bias_hh": uniform(keys[3], 3 * units, units),
            }
            for name, value in parameters.items():
                setattr(self, f"{name}_l{layer}", nnx.Param(value))

    def project(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Bins x [B, T, D] -> what the first layer makes of their patches, float32 [P, B, 3H]."""
        size, stride = patching(self.model)
        return project_patches(x, self._parameters(0)[0], size, stride, dtype).swapaxes(0, 1)

    def project_frames(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Frames as wide as a patch, x [P, B, I] -> as `project`, float32 [P, B, 3H]."""
        return linear(x, self._parameters(0)[0], dtype)

    def __call__(
        self, projected: jax.Array, h0: jax.Array, dtype: jnp.dtype, dropout_key: jax.Array | None
    ) -> jax.Array:
        """Projected input [P, B, 3H], h0 [1, 1, H] -> states of the last layer, [P, B, H]."""
        first = jnp.broadcast_to(h0[0], (projected.shape[1], self.model.units))
        # Time-major: the recurrence slices frames.
        x = projected
        for layer in range(self.layers):
            weight_ih, weight_hh, bias_ih, bias_hh = self._parameters(layer)
            if layer:
                if dropout_key is not None:
                    key = jax.random.fold_in(dropout_key, layer)
                    x = dropout(x, self.model.rnn_dropout, key)
                x = linear(x, weight_ih, dtype)
            x = recurrence(
                (x + bias_ih).astype(dtype),
                first,
                weight_hh,
                bias_hh,
                dtype,
                self.model.recurrence,
            )
        return x

    def stream(
        self, projected: jax.Array, states: jax.Array, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array]:
        """As the call, without dropout, from `states` float32 [layers, B, H] on; gives the states
        after the last frame, too."""
        x, after, units = projected, [], self.model.units
        for layer in range(self.layers):
            weight_ih, weight_hh, bias_ih, bias_hh = self._parameters(layer)
            x = linear(x, weight_ih, dtype) if layer else x
            x, last = wide_recurrence(
                (x + bias_ih).astype(dtype).reshape(*x.shape[:2], 3, units),
                states[layer],
                weight_hh.reshape(3, units, units),
                bias_hh.reshape(3, units),
                dtype,
            )
            after.append(last)
        return x, jnp.stack(after)

    def _parameters(self, layer: int) -> tuple[jax.Array, ...]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return tuple(getattr(self, f"{name}_l{layer}")[...] for name in names)


class Head(nnx.Module):
    """Linear map to the classes."""

    def __init__(self, units: int, classes: int, key: jax.Array):
        weight_key, bias_key = jax.random.split(key)
        self.weight = nnx.Param(xavier(weight_key, (classes, units), jnp.float32))
        self.bias = nnx.Param(uniform(bias_key, classes, units))

    def __call__(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """[B, P, H] -> float32 [B, P, C]."""
        return linear(x, self.weight[...], dtype) + self.bias[...]


class Decoder(nnx.Module):
    """Smoothed features to phoneme logits (NEJM reference, section 3)."""

    def __init__(self, model: ModelConfig, features: int, days: int, key: jax.Array):
        self.model = model
        gru_key, head_key, h0_key = jax.random.split(key, 3)
        self.day = DayLayer(days if model.day_layer else 1, features)
        self.gru = GRUStack(model, features * patching(model)[0], model.layers, gru_key)
        self.head = Head(model.units, model.classes, head_key)
        self.h0 = nnx.Param(first_state(h0_key, model.units))

    def __call__(
        self, x: jax.Array, day: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Smoothed features x [B, T, D], day index [B] -> logits, float32 [B, P, C], one frame per
        80 ms.

        Dropout is on when a key is given.
        """
        dtype = compute_dtype(self.model)
        x = self.day(x, day, dtype)
        if dropout_key is not None:
            input_key, dropout_key = jax.random.split(dropout_key)
            x = dropout(x, self.model.input_dropout, input_key)
        states = self.gru(self.gru.project(x, dtype), self.h0[...], dtype, dropout_key)
        return self.head(states.swapaxes(0, 1), dtype)

    def first_states(self, rows: int) -> dict[str, jax.Array]:
        """What a stream starts from: each layer's state, float32 [layers, B, H]."""
        return {"gru": stacked(self.h0[...], self.model.layers, rows)}

    def stream(
        self, x: jax.Array, day: jax.Array, states: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Whole patches of bins x [B, T, D] -> their logits, and the states after them."""
        dtype = compute_dtype(self.model)
        x = self.gru.project(self.day(x, day, dtype), dtype)
        x, after = self.gru.stream(x, states["gru"], dtype)
        return self.head(x.swapaxes(0, 1), dtype), {"gru": after}


def parameter_count(params: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
