"""The NEJM baseline decoder: day layer, patches, GRU stack, head. Modules hold parameters. The
maths is elsewhere.

Parameters have PyTorch's names and shapes within each part, so that weights cross without
transposing: `day.weight [days, D, D]`, `day.bias [days, D]`, `gru.weight_ih_lK [3H, I]`,
`gru.weight_hh_lK [3H, H]`, `gru.bias_ih_lK [3H]`, `gru.bias_hh_lK [3H]`, `head.weight [C, H]`,
`head.bias [C]`, `h0 [1, 1, H]`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from b2txt_jax.config import ConfigError, ModelSettings, setting
from b2txt_jax.model import dropout
from b2txt_jax.model.day_layer import DAY_SHARDING, day_layer
from b2txt_jax.model.gru.recurrence import KINDS, along_wavefront, recurrence
from b2txt_jax.model.gru.scan import carried_recurrence
from b2txt_jax.model.gru.wavefront import Stack, wavefront
from b2txt_jax.model.interface import (
    Bins,
    Model,
    Output,
    Params,
    Rules,
    Stream,
    compute_dtype,
)
from b2txt_jax.model.orthogonal import orthogonal
from b2txt_jax.model.patches import frame_count, project_patches
from b2txt_jax.model.product import linear
from b2txt_jax.segments import Segments, labels, places, whole

xavier = jax.nn.initializers.glorot_uniform(in_axis=-1, out_axis=-2)


@dataclasses.dataclass(frozen=True)
class GRUSettings(ModelSettings):
    """The GRU decoder, alone or as a part of the triple GRU. The defaults are the published."""

    day_layer: bool = setting(True, help="one input layer per day, or else one that all days share")
    units: int = setting(768, least=1)
    layers: int = setting(5, least=1)
    patch_size: int = setting(14, least=0, help="bins; 0: no patches, one frame per bin")
    patch_stride: int = setting(4, least=1, help="bins")
    input_dropout: float = setting(0.2, least=0, below=1)
    rnn_dropout: float = setting(0.4, least=0, below=1)
    # 'pallas': a TPU kernel that keeps the weights in fast memory; 'wavefront': all layers in one
    # loop; 'auto': the kernel on a TPU where the weights fit, the wavefront on a GPU.
    recurrence: str = setting("auto", choices=KINDS, resumable=True)

    @property
    def patching(self) -> tuple[int, int]:
        """(size, stride) of patches in bins, (1, 1) without patches."""
        return (self.patch_size, self.patch_stride) if self.patch_size else (1, 1)

    @property
    def least_bins(self) -> int:
        """Those of one patch."""
        return self.patching[0]

    @property
    def days_differ(self) -> bool:
        """Whether each day has an input layer of its own."""
        return self.day_layer


def first_state(key: Array, units: int) -> Array:
    """Return a fresh h0 [1, 1, H]: Xavier as PyTorch counts it, fan-in H, fan-out H (its
    receptive field is the last axis)."""
    bound = math.sqrt(6 / (2 * units))
    return jax.random.uniform(key, (1, 1, units), jnp.float32, -bound, bound)


def stacked(h0: Array, layers: int, rows: int) -> Array:
    """Repeat h0 [1, 1, H] of any dtype for every layer and row: float32 [layers, B, H]."""
    return jnp.tile(h0.astype(jnp.float32), (layers, rows, 1))


def uniform(key: Array, size: int, fan_in: int) -> Array:
    """Return a fresh bias [size] within PyTorch's bound, 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, (size,), jnp.float32, -bound, bound)


def draw_layer(key: Array, inputs: int, units: int) -> dict[str, Array]:
    """Return a layer's fresh parameters, drawn as PyTorch does: over all three gates at once."""
    keys = jax.random.split(key, 4)
    return {
        "weight_ih": xavier(keys[0], (3 * units, inputs), jnp.float32),
        "weight_hh": orthogonal(keys[1], 3 * units, units),
        "bias_ih": uniform(keys[2], 3 * units, units),
        "bias_hh": uniform(keys[3], 3 * units, units),
    }


class DayLayer(nnx.Module):
    """Input layers, the identity at first: one per day, or one that all days share."""

    def __init__(self, days: int, features: int):
        self.weight = nnx.Param(jnp.tile(jnp.eye(features), (days, 1, 1)))
        self.bias = nnx.Param(jnp.zeros((days, features)))

    def __call__(self, x: Array, day: Array, dtype: jnp.dtype) -> Array:
        """Apply each row's day layer: x [B, T, D], day [B] -> [B, T, D]."""
        weight = self.weight[...]
        day = day if weight.shape[0] > 1 else jnp.zeros_like(day)
        return day_layer(x, day, weight, self.bias[...], dtype)


class GRUStack(nnx.Module):
    """GRU layers over patches. The first projection and the patches are one strided convolution."""

    def __init__(self, model: GRUSettings, inputs: int, layers: int, key: Array):
        """`inputs`: width of a patch."""
        self.model = model
        self.layers = layers
        units = model.units
        for layer in range(layers):
            fresh = draw_layer(jax.random.fold_in(key, layer), units if layer else inputs, units)
            for name, value in fresh.items():
                setattr(self, f"{name}_l{layer}", nnx.Param(value))

    def project(self, x: Array, dtype: jnp.dtype) -> Array:
        """Project the patches of bins for the first layer: x [B, T, D] -> float32 [P, B, 3H]."""
        size, stride = self.model.patching
        return project_patches(x, self._parameters(0)[0], size, stride, dtype).swapaxes(0, 1)

    def project_frames(self, x: Array, dtype: jnp.dtype) -> Array:
        """Project frames as wide as a patch: x [P, B, I] -> float32 [P, B, 3H]."""
        return linear(x, self._parameters(0)[0], dtype)

    def __call__(
        self,
        projected: Array,
        h0: Array,
        dtype: jnp.dtype,
        dropout_key: Array | None,
        segments: Segments | None = None,
    ) -> Array:
        """Run the layers: projected input [P, B, 3H], h0 [1, 1, H] -> the last one's states
        [P, B, H]. The trials of a row each begin from h0."""
        frames, rows, _ = projected.shape
        stride = self.model.patching[1]
        label = labels(segments or whole(rows), frames, stride).T
        begins = None if segments is None else places(segments, frames, stride).T == 0
        first = jnp.broadcast_to(h0[0], (projected.shape[1], self.model.units))
        if along_wavefront(self.model.recurrence, self.layers):
            return self._along_wavefront(projected, first, dtype, dropout_key, label, begins)
        # Time-major: the recurrence slices frames.
        x = projected
        for layer in range(self.layers):
            weight_ih, weight_hh, bias_ih, bias_hh = self._parameters(layer)
            if layer:
                if dropout_key is not None:
                    key = jax.random.fold_in(dropout_key, layer)
                    x = dropout.dropout(x, self.model.rnn_dropout, key, label)
                x = linear(x, weight_ih, dtype)
            x = recurrence(
                (x + bias_ih).astype(dtype),
                first,
                weight_hh,
                bias_hh,
                dtype,
                self.model.recurrence,
                begins,
            )
        return x

    def _along_wavefront(
        self,
        projected: Array,
        first: Array,
        dtype: jnp.dtype,
        dropout_key: Array | None,
        label: Array,
        begins: Array | None,
    ) -> Array:
        """Run the layers as one loop."""
        parameters = [self._parameters(layer) for layer in range(self.layers)]
        weight_ih, weight_hh, bias_ih, bias_hh = zip(*parameters, strict=True)
        stack = Stack(*(jnp.stack(p) for p in (weight_ih[1:], bias_ih[1:], weight_hh, bias_hh)))
        rate, passed = self.model.rnn_dropout, None
        if dropout_key is not None and rate:
            keys = [jax.random.fold_in(dropout_key, layer) for layer in range(1, self.layers)]
            masks = [dropout.kept(self.model.units, rate, key, label) for key in keys]
            passed = jnp.stack(masks, axis=1)
        projected = (projected + bias_ih[0]).astype(dtype)
        return wavefront(projected, first, stack, dtype, passed, dropout.scale(rate), begins)

    def stream(self, projected: Array, states: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Run the layers without dropout from `states`, float32 [layers, B, H]. Return the last
        layer's states [P, B, H] and all states after the last frame."""
        x, after = projected, []
        for layer in range(self.layers):
            weight_ih, weight_hh, bias_ih, bias_hh = self._parameters(layer)
            x = linear(x, weight_ih, dtype) if layer else x
            # The weight as it lies: in another layout each chunk would copy it.
            x, last = carried_recurrence(
                (x + bias_ih).astype(dtype), states[layer], weight_hh, bias_hh, dtype
            )
            after.append(last)
        return x, jnp.stack(after)

    def _parameters(self, layer: int) -> tuple[Array, ...]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return tuple(getattr(self, f"{name}_l{layer}")[...] for name in names)


class Head(nnx.Module):
    """Linear map to the classes."""

    def __init__(self, units: int, classes: int, key: Array):
        weight_key, bias_key = jax.random.split(key)
        self.weight = nnx.Param(xavier(weight_key, (classes, units), jnp.float32))
        self.bias = nnx.Param(uniform(bias_key, classes, units))

    def __call__(self, x: Array, dtype: jnp.dtype) -> Array:
        """Map states [B, P, H] to logits, float32 [B, P, C]."""
        return linear(x, self.weight[...], dtype) + self.bias[...]


class Decoder(nnx.Module):
    """Smoothed features to phoneme logits (NEJM reference, section 3)."""

    def __init__(self, model: GRUSettings, features: int, days: int, key: Array):
        self.model = model
        gru_key, head_key, h0_key = jax.random.split(key, 3)
        self.day = DayLayer(days if model.day_layer else 1, features)
        self.gru = GRUStack(model, features * model.patching[0], model.layers, gru_key)
        self.head = Head(model.units, model.classes, head_key)
        self.h0 = nnx.Param(first_state(h0_key, model.units))

    def _project(self, x: Array, noise: Array | None, dtype: jnp.dtype) -> Array:
        projected = self.gru.project(x, dtype)
        # W (patches - noise) as W patches - W noise: the patches never exist in memory.
        return projected if noise is None else projected - self.gru.project_frames(noise, dtype)

    def __call__(
        self,
        x: Array,
        day: Array,
        dropout_key: Array | None = None,
        noise: Array | None = None,
        segments: Segments | None = None,
    ) -> Array:
        """Compute logits, one frame per 80 ms: smoothed features x [B, T, D], day index [B] ->
        float32 [B, P, C].

        Dropout is on with a key. Of each patch the `noise` [P, B, I] is subtracted, if there is
        any.
        """
        dtype = compute_dtype(self.model)
        x = self.day(x, day, dtype)
        if dropout_key is not None:
            input_key, dropout_key = jax.random.split(dropout_key)
            label = labels(segments or whole(x.shape[0]), x.shape[1])
            x = dropout.dropout(x, self.model.input_dropout, input_key, label)
        projected = self._project(x, noise, dtype)
        states = self.gru(projected, self.h0[...], dtype, dropout_key, segments)
        return self.head(states.swapaxes(0, 1), dtype)

    def first_states(self, rows: int) -> Array:
        """Return the states that a stream starts from, float32 [layers, B, H]."""
        return stacked(self.h0[...], self.model.layers, rows)

    def stream(
        self, x: Array, day: Array, states: Array, noise: Array | None = None
    ) -> tuple[Array, Array]:
        """Decode whole patches of bins x [B, T, D]: their logits, and the states after them."""
        dtype = compute_dtype(self.model)
        projected = self._project(self.day(x, day, dtype), noise, dtype)
        frames, after = self.gru.stream(projected, states, dtype)
        return self.head(frames.swapaxes(0, 1), dtype), after


class StreamState(NamedTuple):
    """What decoding carries from chunk to chunk."""

    bins: Array
    """[B, K, D], smoothed bins that later patches need, too. At first K is 0."""
    states: Any
    """Each layer's state, float32 [layers, B, H], of several parts by name."""


class PatchedModel(Model):
    """A model of patches whose parameters are an nnx module's, with day layers and states."""

    Settings = GRUSettings
    # The noise model's own first layer stays: it has learned what is not speech.
    embedding: ClassVar[str] = r"(clean/)?(day/.*|gru/(weight|bias)_ih_l0)"
    # The GRU is not split: at 768 units that would cost a transfer in every frame.
    sharding: ClassVar[Rules] = DAY_SHARDING

    def __init__(self, settings: Any, features: int, days: int) -> None:
        super().__init__(settings, features, days)
        self.variant = settings.recurrence

    @abc.abstractmethod
    def module(self, key: Array) -> Any:
        """Return a fresh module with a call (x, day), `first_states` and `stream`."""

    @functools.cached_property
    def _graph(self) -> Any:
        return nnx.graphdef(nnx.eval_shape(lambda: self.module(jax.random.key(0))))

    def bound(self, params: Params) -> Any:
        """Return the module with these parameters."""
        return nnx.merge(self._graph, params)

    def init(self, key: Array) -> Params:
        """Return fresh parameters, as PyTorch would draw them."""
        params: Params = nnx.to_pure_dict(nnx.state(self.module(key)))
        return params

    def frames(self, bins: Bins) -> Bins:
        """Return the number of patches in so many bins."""
        return frame_count(bins, *self.settings.patching)

    def group(self, path: str, leaf: Array) -> str:
        """Return 'day' for the day layers, else as by default."""
        return "day" if "day" in path.split("/") else super().group(path, leaf)

    def separated(self, params: Params) -> tuple[ModelSettings, Params] | None:
        """Return the model with day layers that are all what the shared one was."""
        if self.settings.days_differ:
            return None

        def of(path: tuple[Any, ...], leaf: Array) -> Array:
            shared = any(getattr(key, "key", None) == "day" for key in path)
            return jnp.repeat(leaf, self.days, axis=0) if shared else leaf

        parts: Params = jax.tree_util.tree_map_with_path(of, params)
        return dataclasses.replace(self.settings, day_layer=True), parts

    def variants(self) -> dict[str, ModelSettings]:
        """Return settings for each way to run the recurrence."""
        kinds = ("scan", "pallas")
        return {kind: dataclasses.replace(self.settings, recurrence=kind) for kind in kinds}

    def activation_bytes(self, rows: int, bins: int) -> int:
        """Return an estimate from above: per layer and frame the projected gates, what the backward
        pass keeps, and their gradients."""
        settings = self.settings
        frames = bins // settings.patching[1]
        return int(settings.layers * frames * rows * 8 * settings.units * 4)

    def stream(self) -> Stream:
        """Return functions that decode chunk by chunk.

        A jitted step compiles once for each length of chunk and number of kept bins: with chunks of
        one length, a multiple of model.patch_stride and at least model.patch_size, twice in all.
        With shorter ones, until a patch is full.

        Raises:
          ConfigError: patches leave bins out.
        """
        size, stride = self.settings.patching
        if stride > size:
            raise ConfigError(
                f"model.patch_stride is {stride} and model.patch_size {size}: between such patches "
                "are bins of none, which decoding chunk by chunk does not skip; needed stride <= "
                "size"
            )

        def start(params: Params, rows: int) -> StreamState:
            bins = jnp.zeros((rows, 0, self.features), jnp.float32)
            return StreamState(bins, self.bound(params).first_states(rows))

        def step(
            params: Params, x: Array, day: Array, state: StreamState
        ) -> tuple[Array, StreamState]:
            bins = jnp.concatenate([state.bins, x.astype(jnp.float32)], axis=1)
            frames = self.frames(bins.shape[1])
            if frames == 0:
                logits = jnp.zeros((x.shape[0], 0, self.settings.classes), jnp.float32)
                return logits, state._replace(bins=bins)
            used = (frames - 1) * stride + size
            logits, states = self.bound(params).stream(bins[:, :used], day, state.states)
            return logits, StreamState(bins[:, frames * stride :], states)

        return Stream(start, step)


class GRU(PatchedModel):
    """The published baseline."""

    def __init__(self, settings: Any, features: int, days: int) -> None:
        super().__init__(settings, features, days)
        self.frame_span, self.frame_bins = settings.patching

    def module(self, key: Array) -> Decoder:
        """Return a fresh decoder."""
        return Decoder(self.settings, self.features, self.days, key)

    def apply(
        self,
        params: Params,
        x: Array,
        bins: Array,
        day: Array,
        key: Array | None = None,
        segments: Segments | None = None,
    ) -> Output:
        """Decode the patches. A state never depends on later bins, so that padding needs no
        mask."""
        logits = self.bound(params)(x, day, key, segments=segments)
        return Output(logits, self.frames(bins))
