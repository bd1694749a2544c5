"""The triple GRU: a noise model, a decoder of what is left, and an adversary that reads the noise.

    noise = NoiseModel(x)                           [B, P, I], I the width of a patch
    clean logits = CleanSpeechModel(patches - noise)
    noisy logits = NoisySpeechModel(reverse(noise))

The noisy decoder learns to read speech from the noise; the gradient that it sends to the noise
model is reversed, so that the noise comes to hold no speech (gradient reversal: Ganin and Lempitsky
2015). Noise model and clean decoder have day layers of their own.

Parameters: `noise.day`, `noise.gru` (gates on an axis of their own, see gru_wide.py), `noise.out`
with a bottleneck, `noise.h0`; `clean.day`, `clean.gru`, `clean.head`, `clean.h0`; `noisy.gru`,
`noisy.head`, `noisy.h0`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from b2txt_jax.config import ModelConfig
from b2txt_jax.model.gru.baseline import (
    DayLayer,
    GRUStack,
    Head,
    compute_dtype,
    dropout,
    first_state,
    patching,
    stacked,
    uniform,
    xavier,
)
from b2txt_jax.model.gru.recurrence import recurrence
from b2txt_jax.model.gru.wide import DATA, MODEL, spread, wide_recurrence
from b2txt_jax.model.orthogonal import orthogonal
from b2txt_jax.model.patches import project_patches
from b2txt_jax.model.product import contract, linear


class Outputs(NamedTuple):
    """What a model gives in training."""

    logits: jax.Array
    """float32 [B, P, C]; the triple GRU's clean ones."""
    noisy_logits: jax.Array | None = None
    """float32 [B, P, C], what the adversary reads from the noise."""
    noise: jax.Array | None = None
    """[B, P, I] in the dtype of the products."""


@jax.custom_vjp
def reverse_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x` itself; its gradient comes back multiplied by -factor. `factor`: a scalar."""
    return x


def _reverse_forward(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, factor


def _reverse_backward(factor: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (-factor * cotangent).astype(cotangent.dtype), jnp.zeros_like(factor)


reverse_gradient.defvjp(_reverse_forward, _reverse_backward)


class NoiseStack(nnx.Module):
    """The noise model's GRU layers, whose units devices can share."""

    def __init__(self, model: ModelConfig, inputs: int, key: jax.Array):
        self.model = model
        self.units = model.noise_units or inputs
        units = self.units
        for layer in range(model.noise_layers):
            keys = jax.random.split(jax.random.fold_in(key, layer), 4)
            width = units if layer else inputs
            parameters = {
                # As PyTorch draws them: over all three gates at once.
                "weight_ih": xavier(keys[0], (3 * units, width), jnp.float32),
                "weight_hh": orthogonal(keys[1], 3 * units, units),
                "bias_ih": uniform(keys[2], 3 * units, units),
                "bias_hh": uniform(keys[3], 3 * units, units),
            }
            for name, value in parameters.items():
                apart = value.reshape(3, units, *value.shape[1:])
                setattr(self, f"{name}_l{layer}", nnx.Param(apart))

    def _project(self, x: jax.Array, layer: int, dtype: jnp.dtype) -> jax.Array:
        """Bins [B, T, D] for the first layer, frames [P, B, H] for others -> [P, B, 3, H]."""
        weight = getattr(self, f"weight_ih_l{layer}")[...]
        bias = getattr(self, f"bias_ih_l{layer}")[...]
        if layer == 0:
            size, stride = patching(self.model)
            gates = [project_patches(x, weight[gate], size, stride, dtype) for gate in range(3)]
            projected = jnp.stack(gates, axis=2).swapaxes(0, 1)
        else:
            projected = contract("pbi,gki->pbgk", x, weight, dtype)
        return spread((projected + bias).astype(dtype), None, DATA, None, MODEL)

    def __call__(
        self, x: jax.Array, h0: jax.Array, dtype: jnp.dtype, dropout_key: jax.Array | None
    ) -> jax.Array:
        """x [B, T, D], h0 [1, 1, H] -> states of the last layer, [P, B, H]."""
        first = jnp.broadcast_to(h0[0], (x.shape[0], self.units))
        for layer in range(self.model.noise_layers):
            if layer and dropout_key is not None:
                key = jax.random.fold_in(dropout_key, layer)
                x = dropout(x, self.model.rnn_dropout, key)
            x = self._run(self._project(x, layer, dtype), first, layer, dtype)
        return x

    def _run(
        self, projected: jax.Array, first: jax.Array, layer: int, dtype: jnp.dtype
    ) -> jax.Array:
        weight = getattr(self, f"weight_hh_l{layer}")[...]
        bias = getattr(self, f"bias_hh_l{layer}")[...]
        mesh = jax.sharding.get_abstract_mesh()
        if self.model.recompute_frames or dict(mesh.shape).get(MODEL, 1) > 1:
            chunk = self.model.recompute_frames
            return wide_recurrence(projected, first, weight, bias, dtype, chunk)[0]
        frames, rows, _, units = projected.shape
        return recurrence(
            projected.reshape(frames, rows, 3 * units),
            first,
            weight.reshape(3 * units, units),
            bias.reshape(3 * units),
            dtype,
            # 'pallas' is said of the other two parts: 7168 units are too many for a kernel.
            "scan" if self.model.recurrence == "scan" else "auto",
        )

    def stream(
        self, x: jax.Array, states: jax.Array, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array]:
        """As the call, without dropout, from `states` float32 [layers, B, H] on; gives the states
        after the last frame, too."""
        after = []
        for layer in range(self.model.noise_layers):
            weight, bias = getattr(self, f"weight_hh_l{layer}"), getattr(self, f"bias_hh_l{layer}")
            projected = self._project(x, layer, dtype)
            x, last = wide_recurrence(projected, states[layer], weight[...], bias[...], dtype)
            after.append(last)
        return x, jnp.stack(after)


class NoiseModel(nnx.Module):
    """What of the patches is no speech."""

    def __init__(self, model: ModelConfig, features: int, days: int, key: jax.Array):
        self.model = model
        gru_key, h0_key, out_key = jax.random.split(key, 3)
        width = features * patching(model)[0]
        self.day = DayLayer(days if model.day_layer else 1, features)
        self.gru = NoiseStack(model, width, gru_key)
        self.h0 = nnx.Param(first_state(h0_key, self.gru.units))
        self.out = Head(self.gru.units, width, out_key) if model.noise_units else None

    def _noise(self, states: jax.Array, dtype: jnp.dtype) -> jax.Array:
        if self.out is None:
            return states
        return (linear(states, self.out.weight[...], dtype) + self.out.bias[...]).astype(dtype)

    def __call__(
        self, x: jax.Array, day: jax.Array, dtype: jnp.dtype, dropout_key: jax.Array | None
    ) -> jax.Array:
        """x [B, T, D], day [B] -> the noise in every patch, [P, B, I] of `dtype`."""
        x = self.day(x, day, dtype)
        if dropout_key is not None:
            input_key, dropout_key = jax.random.split(dropout_key)
            x = dropout(x, self.model.input_dropout, input_key)
        return self._noise(self.gru(x, self.h0[...], dtype, dropout_key), dtype)

    def stream(
        self, x: jax.Array, day: jax.Array, states: jax.Array, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array]:
        """Whole patches of bins x -> their noise, and the states after them."""
        frames, after = self.gru.stream(self.day(x, day, dtype), states, dtype)
        return self._noise(frames, dtype), after


class CleanSpeechModel(nnx.Module):
    """The decoder of the patches without their noise."""

    def __init__(self, model: ModelConfig, features: int, days: int, key: jax.Array):
        self.model = model
        gru_key, head_key, h0_key = jax.random.split(key, 3)
        self.day = DayLayer(days if model.day_layer else 1, features)
        self.gru = GRUStack(model, features * patching(model)[0], model.layers, gru_key)
        self.head = Head(model.units, model.classes, head_key)
        self.h0 = nnx.Param(first_state(h0_key, model.units))

    def _project(self, x: jax.Array, noise: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # W (patches - noise) as W patches - W noise: the patches never exist in memory.
        return self.gru.project(x, dtype) - self.gru.project_frames(noise, dtype)

    def __call__(
        self,
        x: jax.Array,
        day: jax.Array,
        noise: jax.Array,
        dtype: jnp.dtype,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """x [B, T, D], day [B], noise [P, B, I] -> logits, float32 [B, P, C]."""
        x = self.day(x, day, dtype)
        if dropout_key is not None:
            input_key, dropout_key = jax.random.split(dropout_key)
            x = dropout(x, self.model.input_dropout, input_key)
        states = self.gru(self._project(x, noise, dtype), self.h0[...], dtype, dropout_key)
        return self.head(states.swapaxes(0, 1), dtype)

    def stream(
        self,
        x: jax.Array,
        day: jax.Array,
        noise: jax.Array,
        states: jax.Array,
        dtype: jnp.dtype,
    ) -> tuple[jax.Array, jax.Array]:
        """As the call, from `states` float32 [layers, B, H] on, which come back with it."""
        projected = self._project(self.day(x, day, dtype), noise, dtype)
        frames, after = self.gru.stream(projected, states, dtype)
        return self.head(frames.swapaxes(0, 1), dtype), after


class NoisySpeechModel(nnx.Module):
    """The adversary: a decoder of the noise alone."""

    def __init__(self, model: ModelConfig, inputs: int, key: jax.Array):
        gru_key, head_key, h0_key = jax.random.split(key, 3)
        self.gru = GRUStack(model, inputs, model.noisy_layers, gru_key)
        self.head = Head(model.units, model.classes, head_key)
        self.h0 = nnx.Param(first_state(h0_key, model.units))

    def __call__(
        self, noise: jax.Array, dtype: jnp.dtype, dropout_key: jax.Array | None
    ) -> jax.Array:
        """noise [P, B, I] -> logits, float32 [B, P, C]."""
        projected = self.gru.project_frames(noise, dtype)
        states = self.gru(projected, self.h0[...], dtype, dropout_key)
        return self.head(states.swapaxes(0, 1), dtype)


class TripleGRU(nnx.Module):
    """The three models; `full` trains, the call and `stream` only decode."""

    def __init__(self, model: ModelConfig, features: int, days: int, key: jax.Array):
        self.model = model
        noise_key, clean_key, noisy_key = jax.random.split(key, 3)
        self.noise = NoiseModel(model, features, days, noise_key)
        self.clean = CleanSpeechModel(model, features, days, clean_key)
        self.noisy = NoisySpeechModel(model, features * patching(model)[0], noisy_key)

    def full(
        self,
        x: jax.Array,
        day: jax.Array,
        dropout_key: jax.Array | None = None,
        reversal: jax.Array | float = 1.0,
    ) -> Outputs:
        """All three: smoothed features x [B, T, D], day index [B] -> Outputs.

        `reversal` is the factor lambda of the gradient that the adversary sends to the noise.
        """
        dtype = compute_dtype(self.model)
        keys = [None] * 3 if dropout_key is None else list(jax.random.split(dropout_key, 3))
        noise = self.noise(x, day, dtype, keys[0])
        logits = self.clean(x, day, noise, dtype, keys[1])
        reversed_ = reverse_gradient(noise, jnp.asarray(reversal, jnp.float32))
        noisy_logits = self.noisy(reversed_, dtype, keys[2])
        return Outputs(logits, noisy_logits, noise.swapaxes(0, 1))

    def __call__(self, x: jax.Array, day: jax.Array) -> jax.Array:
        """Inference, noise and clean only: x [B, T, D], day [B] -> logits, float32 [B, P, C]."""
        dtype = compute_dtype(self.model)
        return self.clean(x, day, self.noise(x, day, dtype, None), dtype, None)

    def first_states(self, rows: int) -> dict[str, jax.Array]:
        """What a stream starts from: each layer's state, float32 [layers, B, H]."""
        return {
            "noise": stacked(self.noise.h0[...], self.model.noise_layers, rows),
            "clean": stacked(self.clean.h0[...], self.model.layers, rows),
        }

    def stream(
        self, x: jax.Array, day: jax.Array, states: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Whole patches of bins x [B, T, D] -> their clean logits, and the states after them."""
        dtype = compute_dtype(self.model)
        noise, after = self.noise.stream(x, day, states["noise"], dtype)
        logits, clean = self.clean.stream(x, day, noise, states["clean"], dtype)
        return logits, {"noise": after, "clean": clean}
