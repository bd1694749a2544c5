"""A trained run with carried state: normalised bins in, logits out, frame by frame."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from b2txt_jax.data.joint import with_zeros
from b2txt_jax.inference.run import Run
from b2txt_jax.model.interface import Params, first_and_further_bins, make_model
from b2txt_jax.signal.rolling import BIN_SECONDS
from b2txt_jax.signal.smooth import smooth_as, taps_of
from lm_server.protocol import CLASS_COUNT


class LiveModel:
    """Smoothing and a model's stream in one compiled program per chunk size.

    Chunk by chunk, its logits are those of `Run.logits` for the whole trial. `renew`
    replaces the parameters between sentences by others of the same shapes, without a new
    compilation.
    """

    def __init__(self, run: Run, day: str | None = None, chunk_frames: int = 1) -> None:
        """Prepare, and compile nothing yet.

        Args:
          run: the trained run.
          day: whose input layer is used. None: that of the last recording day.
          chunk_frames: frames of 80 ms for each call of the model.

        Raises:
          DataError: the run has no such day.
          ConfigError: the model decodes whole trials only.
        """
        self.day = day or run.sessions[-1]
        self.params: Params = jax.device_put(run.params)
        self._next: Params | None = None
        self._day = jnp.full(1, run.day_index(self.day), jnp.int32)
        model = make_model(run.config.model, run.config.data.feature_count, len(run.sessions))
        self._features = run.config.data.feature_count
        self._frames = model.frames
        self._stream = model.stream()
        signal = run.config.signal
        taps, self._ahead = taps_of(signal)
        kept = len(taps) - 1
        first, stride = first_and_further_bins(model)
        self._lead = self._ahead + max(0, first - stride)
        self._chunk = chunk_frames * stride
        self.frame_seconds = stride * BIN_SECONDS
        self.chunk_seconds = self._chunk * BIN_SECONDS
        self.lookahead_seconds = self._ahead * BIN_SECONDS

        def begin(params: Params, x: jax.Array, day: jax.Array) -> tuple[jax.Array, Any]:
            """Take the bins before those that complete the first frame."""
            past = jnp.zeros((1, kept - self._ahead, self._features))
            joined = jnp.concatenate([past, x], axis=1)
            state = self._stream.start(params, 1)
            if self._lead > self._ahead:
                _, state = self._stream.step(params, smooth_as(joined, signal, "valid"), day, state)
            return joined[:, joined.shape[1] - kept :], state

        def step(
            params: Params, x: jax.Array, valid: jax.Array, day: jax.Array, carried: Any
        ) -> tuple[jax.Array, Any]:
            """Take a chunk. From `valid` on its smoothed bins are behind the trial's end."""
            past, state = carried
            joined = jnp.concatenate([past, x], axis=1)
            smoothed = smooth_as(joined, signal, "valid")
            smoothed = jnp.where(jnp.arange(x.shape[1])[:, None] < valid, smoothed, 0)
            logits, state = self._stream.step(params, smoothed, day, state)
            return logits[0], (joined[:, joined.shape[1] - kept :], state)

        self._begin_program = jax.jit(begin)
        self._step_program = jax.jit(step, donate_argnums=4)
        self.begin()

    @property
    def programs(self) -> int:
        """Programs compiled for chunks so far. It stays 1."""
        return int(self._step_program._cache_size())  # type: ignore[attr-defined]

    def warm_up(self) -> None:
        """Compile everything, so that no bin waits for it."""
        self.begin()
        for _ in range(2):
            self.push(np.zeros((self._lead + self._chunk, self._features), np.float32))
        self.finish()
        self.begin()

    def renew(self, params: Params) -> None:
        """Use other parameters from the next sentence on. Another thread may call this."""
        self._next = params

    def begin(self) -> None:
        """Forget the sentence."""
        following, self._next = self._next, None
        if following is not None:
            self.params = following
        self._waiting: list[np.ndarray] = []
        self._bins = self._emitted = self._taken = 0
        self._carried: Any = None

    def push(self, x: np.ndarray) -> np.ndarray:
        """Take normalised bins [T, D]. Return the logits that they complete, float32 [F, 41].

        D may be the day's own number of features, which zeros follow.
        """
        self._waiting += list(with_zeros(np.asarray(x, np.float32), self._features))
        self._bins += len(x)
        return self._advance()

    def finish(self) -> np.ndarray:
        """Return the logits that are left at a sentence's end, float32 [F, 41]."""
        missing = self._frames(self._bins) - self._emitted
        before = self._emitted
        zeros = np.zeros(self._features, np.float32)
        parts = [np.zeros((0, CLASS_COUNT), np.float32)]
        while self._emitted - before < missing:
            needed = self._chunk if self._carried is not None else self._lead + self._chunk
            self._waiting += [zeros] * (needed - len(self._waiting))
            parts.append(self._advance())
        return np.concatenate(parts)[:missing]

    def _advance(self) -> np.ndarray:
        parts = [np.zeros((0, CLASS_COUNT), np.float32)]
        while True:
            size = self._chunk if self._carried is not None else self._lead
            if len(self._waiting) < size:
                return np.concatenate(parts)
            taken, self._waiting = self._waiting[:size], self._waiting[size:]
            x = jnp.asarray(np.array(taken, np.float32).reshape(1, size, self._features))
            if self._carried is None:
                self._carried = self._begin_program(self.params, x, self._day)
                self._taken = size - self._ahead
                continue
            valid = jnp.asarray(self._bins - self._taken, jnp.int32)
            logits, self._carried = self._step_program(
                self.params, x, valid, self._day, self._carried
            )
            self._taken += size
            self._emitted += len(logits)
            parts.append(np.asarray(logits))
