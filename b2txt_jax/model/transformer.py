"""A causal Transformer over patches that do not overlap, after the lowest published greedy PER of
one causal model on T15: time-masked training, no day layer, a left context drawn in every step.

    bins [B, T, D], zeros after the last -> patches [B, P, patch_size * D]
    patches -> LayerNorm -> linear -> LayerNorm -> dropout
    layers times: x + attention(LayerNorm(x)), then x + feed-forward(LayerNorm(x))
    LayerNorm -> linear -> logits [B, P, C]

A frame sees itself and at most `context` frames before it. Its position is one learned scalar per
distance, which every head of a layer adds to its scores. Distances beyond the last share that one.

Attention is plain XLA, one block of BLOCK queries after the other, each with the keys that it may
see and no others: neither the future nor what lies before the longest context is computed. The
context of a step is a traced value that only moves the mask, so that no draw compiles anew. The
ready-made kernels do not serve. `jax.nn.dot_product_attention` and Splash attention have no dropout
of the attention weights, 0.35 in the recipe, and Splash has no learned bias.

Residuals, LayerNorm, softmax and losses are float32. Matrix products run in the compute dtype,
forward and backward. Parameters have PyTorch's shapes, `weight [out, in]`, and PyTorch's fresh
values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from b2txt_jax.config import ConfigError, ModelSettings, setting
from b2txt_jax.model.day_layer import DAY_SHARDING, day_change, day_layer
from b2txt_jax.model.dropout import dropout, dropped, quarters
from b2txt_jax.model.interface import (
    Bins,
    Model,
    Output,
    Params,
    Rules,
    Stream,
    compute_dtype,
)
from b2txt_jax.model.product import contract, linear
from b2txt_jax.segments import Segments, inside, labels, owner, whole

BLOCK = 128
"""Queries that are computed together."""
BINS_PER_SECOND = 50
EPSILON = 1e-5
"""Of LayerNorm, PyTorch's default."""

Attend = Callable[[int, Array, Array, Array], Array]
"""(layer, query, key, value [B, P, H, E]) -> float32 [B, P, H, E]."""


@dataclasses.dataclass(frozen=True)
class TransformerSettings(ModelSettings):
    """The defaults are the published."""

    day_layer: bool = setting(False, help="an input layer per day, which hurt the published model")
    day_change: bool = setting(
        False, help="a linear change of its bins per day, none at first: for days to calibrate"
    )
    patch_size: int = setting(4, least=1, help="bins, one frame each")
    width: int = setting(384, least=1)
    layers: int = setting(5, least=1)
    heads: int = setting(6, least=1)
    head_width: int = setting(64, least=1)
    feedforward: int = setting(1536, least=1, help="hidden width of the feed-forward part")
    distances: int = setting(200, least=1, help="frames; larger distances share the last scalar")
    input_dropout: float = setting(0.2, least=0, below=1, help="of the embedded patches")
    dropout: float = setting(0.35, least=0, below=1, help="of attention, its weights, feed-forward")
    context: float = setting(20.0, least=0, help="s before a frame that it sees in evaluation")
    context_least: float = setting(5.0, least=0, help="s, shortest context of a training step")
    context_most: float = setting(20.0, least=0, help="s, longest context of a training step")

    def frames_in(self, seconds: float) -> int:
        """Return the whole frames in so many seconds."""
        return round(seconds * BINS_PER_SECOND) // self.patch_size

    @property
    def days_differ(self) -> bool:
        """Whether each day has an input layer of its own."""
        return self.day_layer or self.day_change


class StreamState(NamedTuple):
    """What decoding carries from chunk to chunk. Its size does not depend on what has passed."""

    bins: Array
    """[B, K, D], fewer bins than a patch: none if chunks are whole patches."""
    frame: Array
    """int32 [], frames decoded so far."""
    kept: tuple[tuple[Array, Array], ...]
    """Of each layer the keys and values [B, H, context, E] of the last frames, frame f in place
    f % context."""


def normalise(x: Array, params: Params) -> Array:
    """Normalise the last axis: LayerNorm in float32."""
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    variance = jnp.square(centred).mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(variance + EPSILON)
    return scaled * params["weight"] + params["bias"]


def affine(x: Array, params: Params, dtype: jnp.dtype) -> Array:
    """Return x @ weight.T + bias: [B, P, I] -> float32 [B, P, O]."""
    return linear(x, params["weight"], dtype) + params["bias"]


def by_distance(relative: Array, rows: int, columns: int) -> Array:
    """Return a matrix [rows, columns] of `relative [R]` at the distance of each row and column.

    The last row and column have distance 0. What is negative and masked has the value of 0.

    The rows of a Toeplitz matrix are a vector moved by one place each, so that the gradient is a
    sum of moved rows and not a scatter.

    >>> by_distance(jnp.array([0, 1, 2]), 2, 5)
    [[2, 2, 1, 0, 0], [2, 2, 2, 1, 0]]
    """
    last = relative.shape[0] - 1
    near = relative[: min(columns, last)]
    far = jnp.broadcast_to(relative[-1], (columns - near.shape[0],))
    future = jnp.broadcast_to(relative[0], (rows,))  # one more than needed: it moves the rows
    vector = jnp.concatenate([far, near[::-1], future])
    moved = jnp.tile(vector, rows)[: rows * (vector.shape[0] - 1)].reshape(rows, -1)
    return moved[:, rows - 1 : rows - 1 + columns]


def attention(
    query: Array,
    key: Array,
    value: Array,
    relative: Array,
    context: Array | int,
    longest: int,
    dtype: jnp.dtype,
    rate: float = 0.0,
    dropout_key: Array | None = None,
    block: int = BLOCK,
    label: Array | None = None,
    segment: Array | None = None,
) -> Array:
    """Attend to oneself and to the `context` frames before: float32 [B, P, H, E].

    Args:
      query: [B, P, H, E], as key and value.
      key: of each frame.
      value: of each frame.
      relative: what is added to scores by distance, [R].
      context: frames, may be traced.
      longest: what the context never exceeds, static.
      dtype: of products.
      rate: of dropout of the attention weights, with a key.
      dropout_key: random key.
      block: queries that are computed together.
      label: of each frame, [B, P], for dropout.
      segment: of each frame, [B, P]. A frame sees none of another segment.
    """
    if label is None:
        label = labels(whole(query.shape[0]), query.shape[1])
    parts = []
    for first in range(0, query.shape[1], block):
        end = min(first + block, query.shape[1])
        seen = slice(max(first - longest, 0), end)
        rows, columns = end - first, end - seen.start
        scores = contract("bqhe,bkhe->bhqk", query[:, first:end], key[:, seen], dtype)
        distance = columns - rows + jnp.arange(rows)[:, None] - jnp.arange(columns)
        scores = scores / math.sqrt(query.shape[-1]) + by_distance(relative, rows, columns)
        sees = (distance >= 0) & (distance <= context)
        if segment is not None:
            same = segment[:, first:end, None] == segment[:, None, seen]
            sees = (sees & same)[:, None]
        weights = jax.nn.softmax(jnp.where(sees, scores, -jnp.inf), axis=-1)
        if dropout_key is not None and rate > 0:
            # By query and distance, so that a trial's draws do not depend on its place in a row.
            heads = -(-weights.shape[1] // 4)
            channel = jnp.abs(distance) * heads + jnp.arange(heads)[:, None, None]
            drawn = quarters(dropout_key, label[:, None, first:end, None], channel, axis=1)
            weights = dropped(weights, rate, drawn[:, : weights.shape[1]])
        parts.append(contract("bhqk,bkhe->bqhe", weights, value[:, seen], dtype))
    return jnp.concatenate(parts, axis=1)


def _uniform(key: Array, shape: tuple[int, ...], inputs: int) -> Array:
    bound = 1 / math.sqrt(inputs)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _linear_params(key: Array, inputs: int, outputs: int) -> Params:
    weight, bias = jax.random.split(key)
    return {
        "weight": _uniform(weight, (outputs, inputs), inputs),
        "bias": _uniform(bias, (outputs,), inputs),
    }


def _norm_params(width: int) -> Params:
    return {"weight": jnp.ones(width), "bias": jnp.zeros(width)}


class Transformer(Model):
    """The causal Transformer."""

    Settings = TransformerSettings
    embedding: ClassVar[str] = r"(clean/)?embed/.*"
    sharding: ClassVar[Rules] = DAY_SHARDING

    def __init__(self, settings: Any, features: int, days: int) -> None:
        super().__init__(settings, features, days)
        self.frame_bins = self.frame_span = settings.patch_size
        if settings.day_layer and settings.day_change:
            raise ConfigError(
                "configuration keys model.day_layer and model.day_change are True; needed one of "
                "them, since each is what a day has of its own"
            )
        if settings.context_least > settings.context_most:
            raise ConfigError(
                f"configuration key model.context_least is {settings.context_least:g} s and "
                f"model.context_most {settings.context_most:g} s; needed the longest context of a "
                "training step to be at least the shortest"
            )

    def init(self, key: Array) -> Params:
        """Return fresh parameters: PyTorch's, and scalars of distances from N(0, 1)."""
        s, inner = self.settings, self.settings.heads * self.settings.head_width
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        inputs = s.patch_size * self.features

        def layer(key: Array) -> Params:
            keys = jax.random.split(key, 5)
            return {
                "attention": {
                    "norm": _norm_params(s.width),
                    "qkv": {"weight": _uniform(keys[0], (3 * inner, s.width), s.width)},
                    "relative": jax.random.normal(keys[1], (s.distances,)),
                    "out": _linear_params(keys[2], inner, s.width),
                },
                "feedforward": {
                    "norm": _norm_params(s.width),
                    "up": _linear_params(keys[3], s.width, s.feedforward),
                    "down": _linear_params(keys[4], s.feedforward, s.width),
                },
            }

        params = {
            "embed": {
                "patch_norm": _norm_params(inputs),
                "linear": _linear_params(embed_key, inputs, s.width),
                "norm": _norm_params(s.width),
            },
            "norm": _norm_params(s.width),
            "head": _linear_params(head_key, s.width, s.classes),
        }
        for number in range(s.layers):
            params[f"layer{number}"] = layer(jax.random.fold_in(layers_key, number))
        if s.day_layer:
            weight = jnp.tile(jnp.eye(self.features), (self.days, 1, 1))
            params["day"] = {"weight": weight, "bias": jnp.zeros((self.days, self.features))}
        elif s.day_change:
            params["day"] = self._no_change()
        return params

    def _no_change(self) -> Params:
        shape = (self.days, self.features)
        return {"weight": jnp.zeros((*shape, self.features)), "bias": jnp.zeros(shape)}

    def separated(self, params: Params) -> tuple[ModelSettings, Params] | None:
        """Return the model with a change of bins per day, which is none."""
        if self.settings.days_differ:
            return None
        settings = dataclasses.replace(self.settings, day_change=True)
        return settings, {**params, "day": self._no_change()}

    def frames(self, bins: Bins) -> Bins:
        """Return the patches that bins fill, the last one perhaps in part."""
        return -(-bins // self.settings.patch_size)

    def group(self, path: str, leaf: Array) -> str:
        """Return 'day' for the day layers, else as by default."""
        return "day" if "day" in path.split("/") else super().group(path, leaf)

    def activation_bytes(self, rows: int, bins: int) -> int:
        """Return an estimate from above: what each layer keeps for the backward pass."""
        s, frames = self.settings, self.frames(bins)
        columns = min(frames, self.settings.frames_in(s.context_most) + BLOCK)
        per_frame = 8 * s.width + 8 * s.heads * s.head_width + 4 * s.feedforward
        layers = s.layers * (per_frame + 4 * s.heads * columns)
        return 4 * rows * frames * int(layers + 3 * s.patch_size * self.features)

    def _aligned(self, params: Params, x: Array, day: Array) -> Array:
        """Apply the day's layer or change, if there is one."""
        if not self.settings.days_differ:
            return x
        apply = day_layer if self.settings.day_layer else day_change
        own, dtype = params["day"], compute_dtype(self.settings)
        return apply(x, day, own["weight"], own["bias"], dtype)

    def padded(self, x: Array, bins: Array, segments: Segments | None = None) -> Array:
        """Set what is after `bins` to zero, and append zeros until patches are whole."""
        x = jnp.where(inside(segments, bins, x.shape[1])[..., None], x, 0)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.settings.patch_size), (0, 0)))

    def apply(
        self,
        params: Params,
        x: Array,
        bins: Array,
        day: Array,
        key: Array | None = None,
        noise: Array | None = None,
        segments: Segments | None = None,
    ) -> Output:
        """Compute logits, of each patch of which the `noise` [B, P, I] is subtracted, if any.

        With a key, dropout is on and the left context is drawn. Padding needs no mask of its own:
        it comes after a trial's last frame, and no frame sees what comes after it.
        """
        s, dtype = self.settings, compute_dtype(self.settings)
        keys: list[Array | None] = [None] * (s.layers + 2)
        context: Array | int = s.frames_in(s.context)
        longest = s.frames_in(s.context)
        if key is not None:
            drawn = jax.random.split(key, s.layers + 2)
            keys = list(drawn)
            longest = s.frames_in(s.context_most)
            context = jax.random.randint(drawn[1], (), s.frames_in(s.context_least), longest + 1)

        def attend(layer: int, query: Array, key: Array, value: Array) -> Array:
            relative, own = params[f"layer{layer}"]["attention"]["relative"], keys[2 + layer]
            dropout_key = None if own is None else jax.random.fold_in(own, 0)
            return attention(
                query,
                key,
                value,
                relative,
                context,
                longest,
                dtype,
                s.dropout,
                dropout_key,
                label=label,
                segment=segment,
            )

        # Zeros go through the day layer too, as they do where a stream's last patch is filled up.
        x = self._aligned(params, self.padded(x, bins, segments), day)
        frames = x.shape[1] // s.patch_size
        segment = owner(segments, frames, s.patch_size) if segments is not None else None
        label = labels(segments or whole(x.shape[0]), frames, s.patch_size)
        x = self._embedded(params, x, noise, keys[0], label)
        return Output(self._decoded(params, x, attend, keys[2:], label), self.frames(bins))

    def _embedded(
        self,
        params: Params,
        x: Array,
        noise: Array | None,
        key: Array | None,
        label: Array | None = None,
    ) -> Array:
        """Embed whole patches of bins: x [B, T, D] -> float32 [B, P, W]."""
        s, embed = self.settings, params["embed"]
        x = x.astype(jnp.float32).reshape(x.shape[0], -1, s.patch_size * self.features)
        x = normalise(x if noise is None else x - noise, embed["patch_norm"])
        x = affine(x, embed["linear"], compute_dtype(s))
        return dropout(normalise(x, embed["norm"]), s.input_dropout, key, label)

    def _decoded(
        self,
        params: Params,
        x: Array,
        attend: Attend,
        keys: list[Array | None],
        label: Array | None = None,
    ) -> Array:
        """Run the layers and the head: [B, P, W] -> logits, float32 [B, P, C]."""
        s, dtype = self.settings, compute_dtype(self.settings)
        for number in range(s.layers):
            one, key = params[f"layer{number}"], keys[number]

            def thinned(x: Array, place: int, key: Array | None = key) -> Array:
                own = None if key is None else jax.random.fold_in(key, place)
                return dropout(x, s.dropout, own, label)

            part = one["attention"]
            qkv = linear(normalise(x, part["norm"]), part["qkv"]["weight"], dtype)
            query, key_, value = jnp.moveaxis(
                qkv.reshape(*x.shape[:2], 3, s.heads, s.head_width), 2, 0
            )
            mixed = attend(number, query, key_, value).reshape(*x.shape[:2], -1)
            x = x + thinned(affine(mixed, part["out"], dtype), 1)
            part = one["feedforward"]
            hidden = affine(normalise(x, part["norm"]), part["up"], dtype)
            hidden = thinned(jax.nn.gelu(hidden, approximate=False), 2)
            x = x + thinned(affine(hidden, part["down"], dtype), 3)
        return affine(normalise(x, params["norm"]), params["head"], dtype)

    def stream(self) -> Stream:
        """Return functions that decode chunk by chunk with the context of evaluation.

        The keys and values of the last frames are kept, and nothing older: a frame costs the same
        however long the recording is. A jitted step compiles once for chunks of one length that is
        a multiple of model.patch_size, and for others once per number of bins left over. A
        recording that ends within a patch gets its last frame when zeros fill the patch. Donate the
        state to the step, or every chunk copies it.
        """
        s, dtype = self.settings, compute_dtype(self.settings)

        # Jitted, so that the state is placed as the parameters are: else the second step compiles.
        @functools.partial(jax.jit, static_argnums=1, keep_unused=True)
        def start(params: Params, rows: int) -> StreamState:
            shape = (rows, s.heads, s.frames_in(s.context), s.head_width)
            kept = tuple(
                (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(s.layers)
            )
            bins = jnp.zeros((rows, 0, self.features), jnp.float32)
            return StreamState(bins, jnp.zeros((), jnp.int32), kept)

        def step(
            params: Params, x: Array, day: Array, state: StreamState
        ) -> tuple[Array, StreamState]:
            used, left = self.whole_patches(state.bins, x)
            logits, state = self.stream_frames(params, used, day, state)
            return logits, state._replace(bins=left)

        return Stream(start, step)

    def whole_patches(self, before: Array, x: Array) -> tuple[Array, Array]:
        """Join bins [B, K, D] and [B, T, D]. Return those of whole patches, and the rest."""
        bins = jnp.concatenate([before, x.astype(jnp.float32)], axis=1)
        used, left = jnp.split(bins, [bins.shape[1] - bins.shape[1] % self.settings.patch_size], 1)
        return used, left

    def stream_frames(
        self, params: Params, x: Array, day: Array, state: StreamState, noise: Array | None = None
    ) -> tuple[Array, StreamState]:
        """Decode whole patches of bins, one after the other: logits [B, P, C], and the state after
        them. Of each patch the `noise` [B, P, I] is subtracted, if there is any."""
        embedded = self._embedded(params, self._aligned(params, x, day), noise, None)
        if embedded.shape[1] == 1:  # a loop would copy what is kept four times
            return self._stream_frame(params, embedded, state)

        def frame(state: StreamState, x: Array) -> tuple[StreamState, Array]:
            logits, state = self._stream_frame(params, x[:, None], state)
            return state, logits[:, 0]

        state, logits = jax.lax.scan(frame, state, embedded.swapaxes(0, 1))
        return logits.swapaxes(0, 1), state

    def _stream_frame(
        self, params: Params, x: Array, state: StreamState
    ) -> tuple[Array, StreamState]:
        """Decode one embedded patch [B, 1, W]: logits [B, 1, C], and the state after it."""
        s, dtype = self.settings, compute_dtype(self.settings)
        places = state.kept[0][0].shape[2]
        age = 1 + (state.frame - 1 - jnp.arange(places)) % max(places, 1)
        distance = jnp.append(age, 0)
        seen = distance <= state.frame  # places that no frame has had yet are empty
        kept = []

        def attend(layer: int, query: Array, key: Array, value: Array) -> Array:
            query, key, value = (one.swapaxes(1, 2).astype(dtype) for one in (query, key, value))
            keys, values = state.kept[layer]
            relative = params[f"layer{layer}"]["attention"]["relative"]
            scores = jnp.concatenate(
                [contract("bhqe,bhke->bhqk", query, one, dtype) for one in (keys, key)], axis=-1
            )
            scores = scores / math.sqrt(s.head_width)
            scores += relative[jnp.minimum(distance, s.distances - 1)]
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            # The new frame is written after all reading, which lets the compiler write in place.
            old = contract("bhqk,bhke->bhqe", weights[..., :-1], values, dtype)
            mixed = old + contract("bhqk,bhke->bhqe", weights[..., -1:], value, dtype)
            kept.append((key, value))
            return mixed.swapaxes(1, 2)

        logits = self._decoded(params, x, attend, [None] * s.layers)
        written = state.kept
        if places:
            # Zero, but not for the compiler: it writes in place only what was read before for sure.
            after = jnp.minimum(jnp.abs(logits[0, 0, 0]).astype(jnp.int32), 0)
            place = state.frame % places + after
            write = jax.lax.dynamic_update_slice_in_dim
            written = jax.tree.map(lambda old, new: write(old, new, place, 2), written, tuple(kept))
        return logits, state._replace(frame=state.frame + 1, kept=written)
