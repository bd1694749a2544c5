"""The triple GRU: a noise model, a decoder of what is left, and an adversary that reads the noise.

    noise = NoiseModel(x)                           [B, P, I], I the width of a patch
    clean logits = Decoder(patches - noise)
    noisy logits = NoisySpeechModel(reverse(noise))

The noisy decoder learns to read speech from the noise. The gradient that it sends to the noise
model is reversed, so that the noise comes to hold no speech (gradient reversal: Ganin and Lempitsky
2015). Noise model and clean decoder have day layers of their own.

Parameters: `noise.day`, `noise.gru` (gates on an axis of their own, see gru/wide.py), `noise.out`
with a bottleneck, `noise.h0`, `clean.day`, `clean.gru`, `clean.head`, `clean.h0`, `noisy.gru`,
`noisy.head`, `noisy.h0`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from b2txt_jax.config import setting
from b2txt_jax.model.dropout import dropout
from b2txt_jax.model.gru.baseline import (
    DayLayer,
    Decoder,
    GRUSettings,
    GRUStack,
    Head,
    PatchedModel,
    draw_layer,
    first_state,
    stacked,
)
from b2txt_jax.model.gru.recurrence import recurrence
from b2txt_jax.model.gru.scan import carried_recurrence
from b2txt_jax.model.gru.wide import spread, wide_recurrence
from b2txt_jax.model.interface import (
    DATA,
    MODEL,
    MeanCTC,
    Model,
    Output,
    Params,
    Rules,
    compute_dtype,
)
from b2txt_jax.model.patches import project_patches
from b2txt_jax.model.product import contract, linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarySettings:
    """The settings of noise model and adversary, and of how they are trained against each other."""

    noise_units: int = setting(
        0,
        least=0,
        help="of the noise model's GRU; 0: as wide as a patch, its states are the noise; otherwise "
        "a projection makes the noise of them",
    )
    noise_layers: int = setting(2, least=1)
    noisy_layers: int = setting(2, least=1, help="of the decoder that reads the noise")
    recompute_frames: int = setting(
        0,
        least=0,
        help="frames between the states that the noise model keeps for the backward pass, which "
        "computes the others again; 0 keeps all",
        resumable=True,
    )
    noisy_weight: float = setting(
        1.0, least=0, help="of the noise decoder's CTC loss; the clean decoder's has 1"
    )
    reversal: float = setting(1.0, least=0, help="largest factor lambda of the reversed gradient")
    reversal_rate: float = setting(
        10.0,
        least=0,
        help="lambda = reversal * (2 / (1 + exp(-reversal_rate * progress)) - 1), progress from 0 "
        "to 1 over train.steps (Ganin and Lempitsky 2015)",
    )


@dataclasses.dataclass(frozen=True)
class TripleGRUSettings(GRUSettings, AdversarySettings):
    """Those of the clean decoder and of the other two parts."""


@jax.custom_vjp
def reverse_gradient(x: Array, factor: Array) -> Array:
    """Return `x` itself. Its gradient comes back multiplied by -factor, a scalar."""
    return x


def _reverse_forward(x: Array, factor: Array) -> tuple[Array, Array]:
    return x, factor


def _reverse_backward(factor: Array, cotangent: Array) -> tuple[Array, Array]:
    return (-factor * cotangent).astype(cotangent.dtype), jnp.zeros_like(factor)


reverse_gradient.defvjp(_reverse_forward, _reverse_backward)


class NoiseStack(nnx.Module):
    """The noise model's GRU layers, whose units devices can share."""

    def __init__(self, model: TripleGRUSettings, inputs: int, key: Array):
        self.model = model
        self.units = model.noise_units or inputs
        units = self.units
        for layer in range(model.noise_layers):
            fresh = draw_layer(jax.random.fold_in(key, layer), units if layer else inputs, units)
            for name, value in fresh.items():
                apart = value.reshape(3, units, *value.shape[1:])
                setattr(self, f"{name}_l{layer}", nnx.Param(apart))

    def _project(self, x: Array, layer: int, dtype: jnp.dtype) -> Array:
        """Project bins [B, T, D] for the first layer, frames [P, B, H] for others: [P, B, 3, H]."""
        weight = getattr(self, f"weight_ih_l{layer}")[...]
        bias = getattr(self, f"bias_ih_l{layer}")[...]
        if layer == 0:
            size, stride = self.model.patching
            gates = [project_patches(x, weight[gate], size, stride, dtype) for gate in range(3)]
            projected = jnp.stack(gates, axis=2).swapaxes(0, 1)
        else:
            projected = contract("pbi,gki->pbgk", x, weight, dtype)
        return spread((projected + bias).astype(dtype), None, DATA, None, MODEL)

    def __call__(self, x: Array, h0: Array, dtype: jnp.dtype, dropout_key: Array | None) -> Array:
        """Run the layers: x [B, T, D], h0 [1, 1, H] -> states of the last one, [P, B, H]."""
        first = jnp.broadcast_to(h0[0], (x.shape[0], self.units))
        for layer in range(self.model.noise_layers):
            if layer and dropout_key is not None:
                key = jax.random.fold_in(dropout_key, layer)
                x = dropout(x, self.model.rnn_dropout, key)
            x = self._run(self._project(x, layer, dtype), first, layer, dtype)
        return x

    def _run(self, projected: Array, first: Array, layer: int, dtype: jnp.dtype) -> Array:
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
            # 'pallas' is meant for the other two parts: 7168 units are too many for a kernel.
            "scan" if self.model.recurrence == "scan" else "auto",
        )

    def stream(self, x: Array, states: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Run the layers without dropout from `states`, float32 [layers, B, H]. Return the last
        layer's states [P, B, H] and all states after the last frame."""
        after, gates = [], 3 * self.units
        for layer in range(self.model.noise_layers):
            weight, bias = getattr(self, f"weight_hh_l{layer}"), getattr(self, f"bias_hh_l{layer}")
            projected = self._project(x, layer, dtype)
            x, last = carried_recurrence(
                projected.reshape(*projected.shape[:2], gates),
                states[layer],
                weight[...].reshape(gates, self.units),
                bias[...].reshape(gates),
                dtype,
            )
            after.append(last)
        return x, jnp.stack(after)


class NoiseModel(nnx.Module):
    """The part of the patches that is no speech."""

    def __init__(self, model: TripleGRUSettings, features: int, days: int, key: Array):
        self.model = model
        gru_key, h0_key, out_key = jax.random.split(key, 3)
        width = features * model.patching[0]
        self.day = DayLayer(days if model.day_layer else 1, features)
        self.gru = NoiseStack(model, width, gru_key)
        self.h0 = nnx.Param(first_state(h0_key, self.gru.units))
        self.out = Head(self.gru.units, width, out_key) if model.noise_units else None

    def _noise(self, states: Array, dtype: jnp.dtype) -> Array:
        if self.out is None:
            return states
        return (linear(states, self.out.weight[...], dtype) + self.out.bias[...]).astype(dtype)

    def __call__(self, x: Array, day: Array, dtype: jnp.dtype, dropout_key: Array | None) -> Array:
        """Estimate the noise in every patch: x [B, T, D], day [B] -> [P, B, I] of `dtype`."""
        x = self.day(x, day, dtype)
        if dropout_key is not None:
            input_key, dropout_key = jax.random.split(dropout_key)
            x = dropout(x, self.model.input_dropout, input_key)
        return self._noise(self.gru(x, self.h0[...], dtype, dropout_key), dtype)

    def stream(self, x: Array, day: Array, states: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Estimate the noise of whole patches of bins x. Return it and the states after them."""
        frames, after = self.gru.stream(self.day(x, day, dtype), states, dtype)
        return self._noise(frames, dtype), after


class NoisySpeechModel(nnx.Module):
    """The adversary: a decoder of the noise alone."""

    def __init__(self, model: TripleGRUSettings, inputs: int, key: Array):
        gru_key, head_key, h0_key = jax.random.split(key, 3)
        self.gru = GRUStack(model, inputs, model.noisy_layers, gru_key)
        self.head = Head(model.units, model.classes, head_key)
        self.h0 = nnx.Param(first_state(h0_key, model.units))

    def __call__(self, noise: Array, dtype: jnp.dtype, dropout_key: Array | None) -> Array:
        """Decode the noise [P, B, I]: logits, float32 [B, P, C]."""
        projected = self.gru.project_frames(noise, dtype)
        states = self.gru(projected, self.h0[...], dtype, dropout_key)
        return self.head(states.swapaxes(0, 1), dtype)


class TripleDecoder(nnx.Module):
    """The three parts. `full` trains, the call and `stream` only decode."""

    def __init__(self, model: TripleGRUSettings, features: int, days: int, key: Array):
        self.model = model
        noise_key, clean_key, noisy_key = jax.random.split(key, 3)
        self.noise = NoiseModel(model, features, days, noise_key)
        self.clean = Decoder(model, features, days, clean_key)
        self.noisy = NoisySpeechModel(model, features * model.patching[0], noisy_key)

    def full(
        self, x: Array, day: Array, dropout_key: Array | None = None, reversal: Array | float = 1.0
    ) -> tuple[Array, Array, Array]:
        """Run all three parts: smoothed features x [B, T, D], day index [B] -> clean and noisy
        logits, float32 [B, P, C], and the noise [B, P, I].

        `reversal` is the factor lambda of the gradient that the adversary sends to the noise.
        """
        dtype = compute_dtype(self.model)
        keys = [None] * 3 if dropout_key is None else list(jax.random.split(dropout_key, 3))
        noise = self.noise(x, day, dtype, keys[0])
        logits = self.clean(x, day, keys[1], noise)
        reversed_ = reverse_gradient(noise, jnp.asarray(reversal, jnp.float32))
        noisy_logits = self.noisy(reversed_, dtype, keys[2])
        return logits, noisy_logits, noise.swapaxes(0, 1)

    def __call__(self, x: Array, day: Array) -> Array:
        """Decode with noise model and clean decoder: x [B, T, D], day [B] -> logits, float32
        [B, P, C]."""
        dtype = compute_dtype(self.model)
        return self.clean(x, day, None, self.noise(x, day, dtype, None))

    def first_states(self, rows: int) -> dict[str, Array]:
        """Return the states that a stream starts from, float32 [layers, B, H]."""
        return {
            "noise": stacked(self.noise.h0[...], self.model.noise_layers, rows),
            "clean": self.clean.first_states(rows),
        }

    def stream(
        self, x: Array, day: Array, states: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Decode whole patches of bins x [B, T, D]: clean logits, and the states after them."""
        dtype = compute_dtype(self.model)
        noise, after = self.noise.stream(x, day, states["noise"], dtype)
        logits, clean = self.clean.stream(x, day, states["clean"], noise)
        return logits, {"noise": after, "clean": clean}


# Up to 7168 wide, gates on an axis of their own: every device has all gates of its units.
NOISE_SHARDING: Rules = (
    (r"noise/gru/weight_(ih|hh)_l\d+", P(None, MODEL)),
    (r"noise/gru/bias_(ih|hh)_l\d+", P(None, MODEL)),
    (r"noise/h0", P(None, None, MODEL)),
    (r"noise/out/weight", P(MODEL)),
    (r"noise/out/bias", P(MODEL)),
)


class AdversarialModel(Model):
    """A model with a noise model and an adversary: training weighs the two decoders' losses,
    decoding uses the clean one."""

    @abc.abstractmethod
    def full(
        self,
        params: Params,
        x: Array,
        bins: Array,
        day: Array,
        key: Array | None = None,
        reversal: Array | float = 1.0,
    ) -> Output:
        """Run all three parts: `aux` holds the noisy logits [B, P, C] and the noise [B, P, I]."""

    def validate(self, params: Params, x: Array, bins: Array, day: Array) -> Output:
        """Decode the noise too: its PER stays near 1 when there is no speech in it."""
        output = self.full(params, x, bins, day)
        return output._replace(aux={"noisy": output.aux["noisy"]})

    def loss(  # type: ignore[override]  # one trial a row: no segments
        self,
        params: Params,
        x: Array,
        bins: Array,
        day: Array,
        ctc: MeanCTC,
        key: Array | None = None,
        progress: Array | float = 1.0,
    ) -> tuple[Array, dict[str, Array]]:
        """Return the weighed sum of both decoders' CTC losses, and its parts."""
        settings = self.settings
        reversal = settings.reversal * (2 / (1 + jnp.exp(-settings.reversal_rate * progress)) - 1)
        with jax.named_scope("model"):
            output = self.full(params, x, bins, day, key, reversal)
        clean, noisy = ctc(output.logits, output.frames), ctc(output.aux["noisy"], output.frames)
        power = jnp.square(output.aux["noise"].astype(jnp.float32)).mean(axis=-1)
        valid = jnp.arange(power.shape[1]) < output.frames[:, None]
        power = jnp.where(valid, power, 0.0).sum() / jnp.maximum(valid.sum(), 1)
        parts = {
            "clean_loss": clean,
            "noisy_loss": noisy,
            "noise_rms": jnp.sqrt(power),
            "reversal": reversal,
        }
        return clean + settings.noisy_weight * noisy, parts


class TripleGRU(AdversarialModel, PatchedModel):
    """The triple GRU."""

    Settings = TripleGRUSettings
    sharding: ClassVar[Rules] = (
        *NOISE_SHARDING,
        *PatchedModel.sharding,
    )

    def module(self, key: Array) -> TripleDecoder:
        """Return the three fresh parts."""
        return TripleDecoder(self.settings, self.features, self.days, key)

    def apply(
        self, params: Params, x: Array, bins: Array, day: Array, key: Array | None = None
    ) -> Output:
        """Decode with the noise model and the clean decoder. With a key, run the adversary too."""
        if key is not None:
            return self.full(params, x, bins, day, key)
        return Output(self.bound(params)(x, day), self.frames(bins))

    def full(
        self,
        params: Params,
        x: Array,
        bins: Array,
        day: Array,
        key: Array | None = None,
        reversal: Array | float = 1.0,
    ) -> Output:
        """Run all three parts: `aux` holds the noisy logits [B, P, C] and the noise [B, P, I]."""
        logits, noisy, noise = self.bound(params).full(x, day, key, reversal)
        return Output(logits, self.frames(bins), {"noisy": noisy, "noise": noise})
