"""The triple GRU's noise model and adversary around the Transformer.

    noise = NoiseModel(x)                           [B, P, I], I the width of a patch
    clean logits = Transformer(patches - noise)
    noisy logits = NoisySpeechModel(reverse(noise))

Parameters: `noise` and `noisy` as of the triple GRU, `clean` as of the Transformer.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from b2txt_jax.config import setting
from b2txt_jax.model.gru.baseline import stacked
from b2txt_jax.model.interface import Bins, Output, Params, Rules, Stream, compute_dtype
from b2txt_jax.model.transformer import StreamState, Transformer, TransformerSettings
from b2txt_jax.model.triple_gru import (
    NOISE_SHARDING,
    AdversarialModel,
    AdversarySettings,
    NoiseModel,
    NoisySpeechModel,
    TripleGRUSettings,
    reverse_gradient,
)


@dataclasses.dataclass(frozen=True)
class TripleTransformerSettings(TransformerSettings, AdversarySettings):
    """Those of the Transformer, of the noise model, and of the adversary."""

    units: int = setting(768, least=1, help="of the adversary's GRU")
    rnn_dropout: float = setting(0.4, least=0, below=1, help="of noise model and adversary")

    @property
    def of_gru(self) -> TripleGRUSettings:
        """The settings of noise model and adversary."""
        shared = {field.name for field in dataclasses.fields(TripleGRUSettings)}
        own = {field.name for field in dataclasses.fields(self)} & shared
        values = {name: getattr(self, name) for name in own}
        return TripleGRUSettings(patch_stride=self.patch_size, **values)


class TripleStreamState(NamedTuple):
    """What decoding carries from chunk to chunk."""

    noise: Array
    """The noise model's states, float32 [layers, B, H]."""
    clean: StreamState


class TripleTransformer(AdversarialModel):
    """A noise model in front of the Transformer, and its adversary."""

    Settings = TripleTransformerSettings
    embedding: ClassVar[str] = Transformer.embedding
    sharding: ClassVar[Rules] = (*NOISE_SHARDING, *Transformer.sharding)

    def __init__(self, settings: Any, features: int, days: int) -> None:
        super().__init__(settings, features, days)
        self.clean = Transformer(settings, features, days)

    def _modules(self, key: Array) -> dict[str, nnx.Module]:
        settings, (noise, noisy) = self.settings.of_gru, jax.random.split(key)
        return {
            "noise": NoiseModel(settings, self.features, self.days, noise),
            "noisy": NoisySpeechModel(settings, self.features * settings.patch_size, noisy),
        }

    @functools.cached_property
    def _graphs(self) -> dict[str, Any]:
        shapes = nnx.eval_shape(lambda: self._modules(jax.random.key(0)))
        return {name: nnx.graphdef(module) for name, module in shapes.items()}

    def _bound(self, params: Params, name: str) -> Any:
        return nnx.merge(self._graphs[name], params[name])

    def init(self, key: Array) -> Params:
        """Return fresh parameters of the three parts."""
        clean, others = jax.random.split(key)
        modules = self._modules(others).items()
        parts = {name: nnx.to_pure_dict(nnx.state(module)) for name, module in modules}
        return {**parts, "clean": self.clean.init(clean)}

    def frames(self, bins: Bins) -> Bins:
        """Return the Transformer's frames."""
        return self.clean.frames(bins)

    def group(self, path: str, leaf: Array) -> str:
        """Return 'day' for the day layers, else as by default."""
        return self.clean.group(path, leaf)

    def activation_bytes(self, rows: int, bins: int) -> int:
        """Return the Transformer's and, for the noise, a few copies of the patches."""
        return self.clean.activation_bytes(rows, bins) + 16 * 4 * rows * bins * self.features

    def _noise(self, params: Params, x: Array, bins: Array, day: Array, key: Array | None) -> Array:
        dtype = compute_dtype(self.settings)
        return self._bound(params, "noise")(self.clean.padded(x, bins), day, dtype, key)

    def apply(
        self, params: Params, x: Array, bins: Array, day: Array, key: Array | None = None
    ) -> Output:
        """Decode with the noise model and the Transformer. With a key, run the adversary too."""
        if key is not None:
            return self.full(params, x, bins, day, key)
        noise = self._noise(params, x, bins, day, None).swapaxes(0, 1)
        return self.clean.apply(params["clean"], x, bins, day, None, noise)

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
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        noise = self._noise(params, x, bins, day, keys[0])
        by_row = noise.swapaxes(0, 1)
        clean = self.clean.apply(params["clean"], x, bins, day, keys[1], by_row)
        reversed_ = reverse_gradient(noise, jnp.asarray(reversal, jnp.float32))
        noisy = self._bound(params, "noisy")(reversed_, compute_dtype(self.settings), keys[2])
        return clean._replace(aux={"noisy": noisy, "noise": by_row})

    def stream(self) -> Stream:
        """Return functions that decode chunk by chunk, as the Transformer's do."""
        clean, layers = self.clean, self.settings.noise_layers

        def start(params: Params, rows: int) -> TripleStreamState:
            noise = stacked(params["noise"]["h0"], layers, rows)
            return TripleStreamState(noise, clean.stream().start(params["clean"], rows))

        def step(
            params: Params, x: Array, day: Array, state: TripleStreamState
        ) -> tuple[Array, TripleStreamState]:
            used, left = clean.whole_patches(state.clean.bins, x)
            if used.shape[1] == 0:
                logits = jnp.zeros((x.shape[0], 0, self.settings.classes), jnp.float32)
                return logits, state._replace(clean=state.clean._replace(bins=left))
            dtype = compute_dtype(self.settings)
            noise, after = self._bound(params, "noise").stream(used, day, state.noise, dtype)
            logits, decoded = clean.stream_frames(
                params["clean"], used, day, state.clean, noise.swapaxes(0, 1)
            )
            return logits, TripleStreamState(after, decoded._replace(bins=left))

        return Stream(start, step)
