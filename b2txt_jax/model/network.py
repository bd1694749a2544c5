"""The models by their name in the configuration, as pure functions of their parameters.

Whole trials: `make_forward` for training, `make_apply` for decoding. A recording under way:
`make_stream`, chunk after chunk with carried states, equal to decoding the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from b2txt_jax.config import ConfigError, ModelConfig
from b2txt_jax.model.gru.baseline import Decoder, Params, patching
from b2txt_jax.model.triple_gru import Outputs, TripleGRU

Network = Decoder | TripleGRU


class Forward(Protocol):
    """Training's pass through a model."""

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        day: jax.Array,
        dropout_key: jax.Array | None = None,
        reversal: jax.Array | float = 1.0,
    ) -> Outputs:
        """Smoothed features x [B, T, D], day index [B] -> Outputs; dropout is on with a key."""
        ...


class StreamState(NamedTuple):
    """What decoding carries from chunk to chunk."""

    bins: jax.Array
    """[B, K, D], smoothed bins that later patches need, too; at first K is 0."""
    states: dict[str, jax.Array]
    """Each part's states, float32 [layers, B, H]."""


def _make(model: ModelConfig, features: int, days: int, key: jax.Array) -> Network:
    kind = TripleGRU if model.kind == "triple_gru" else Decoder
    return kind(model, features, days, key)


def init_params(model: ModelConfig, features: int, days: int, key: jax.Array) -> Params:
    """Fresh parameters, a nested dict of float32 arrays."""
    params: Params = nnx.to_pure_dict(nnx.state(_make(model, features, days, key)))
    return params


def _merger(model: ModelConfig, features: int, days: int) -> Callable[[Params], Any]:
    abstract = nnx.eval_shape(lambda: _make(model, features, days, jax.random.key(0)))
    graph = nnx.graphdef(abstract)

    def merge(params: Params) -> Any:
        return nnx.merge(graph, params)

    return merge


def make_forward(model: ModelConfig, features: int, days: int) -> Forward:
    """Returns training's pure function of parameters and input."""
    merge = _merger(model, features, days)

    def forward(
        params: Params,
        x: jax.Array,
        day: jax.Array,
        dropout_key: jax.Array | None = None,
        reversal: jax.Array | float = 1.0,
    ) -> Outputs:
        network = merge(params)
        if isinstance(network, TripleGRU):
            return network.full(x, day, dropout_key, reversal)
        return Outputs(network(x, day, dropout_key))

    return forward


def make_apply(
    model: ModelConfig, features: int, days: int
) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """Returns decoding's pure function: `apply(params, x, day) -> logits`, float32 [B, P, C]."""
    merge = _merger(model, features, days)

    def apply(params: Params, x: jax.Array, day: jax.Array) -> jax.Array:
        logits: jax.Array = merge(params)(x, day)
        return logits

    return apply


def make_stream(
    model: ModelConfig, features: int, days: int
) -> tuple[
    Callable[[Params, int], StreamState],
    Callable[[Params, jax.Array, jax.Array, StreamState], tuple[jax.Array, StreamState]],
]:
    """Returns `start(params, rows) -> state` and `step(params, x, day, state) -> (logits, state)`.

    `x` holds the next smoothed bins of every row, [B, T, D] with any T; the logits are those of the
    frames that they complete, [B, P, C] with P from 0 on. A jitted step compiles once for each T
    and number of kept bins: with chunks of one length, a multiple of model.patch_stride and at
    least model.patch_size, twice in all; with shorter ones, until a patch is full.

    Raises:
      ConfigError: patches leave bins out.
    """
    merge = _merger(model, features, days)
    size, stride = patching(model)
    if stride > size:
        raise ConfigError(
            f"model.patch_stride is {stride} and model.patch_size {size}: between such patches are "
            "bins of none, which decoding chunk by chunk does not skip; needed stride <= size"
        )

    def start(params: Params, rows: int) -> StreamState:
        return StreamState(
            jnp.zeros((rows, 0, features), jnp.float32), merge(params).first_states(rows)
        )

    def step(
        params: Params, x: jax.Array, day: jax.Array, state: StreamState
    ) -> tuple[jax.Array, StreamState]:
        bins = jnp.concatenate([state.bins, x.astype(jnp.float32)], axis=1)
        frames = max(0, (bins.shape[1] - size) // stride + 1)
        if frames == 0:
            logits = jnp.zeros((x.shape[0], 0, model.classes), jnp.float32)
            return logits, state._replace(bins=bins)
        used = (frames - 1) * stride + size
        logits, states = merge(params).stream(bins[:, :used], day, state.states)
        return logits, StreamState(bins[:, frames * stride :], states)

    return start, step
