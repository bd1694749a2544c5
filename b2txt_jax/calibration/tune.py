"""A fixed number of small steps on few trials: the part that calibration and self-calibration
share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from b2txt_jax.calibration.moving import Moved, Moving
from b2txt_jax.config import Config
from b2txt_jax.data.loader import Batch
from b2txt_jax.model.interface import Params
from b2txt_jax.training.step import StepKeys, make_loss, step_keys

_EPSILON = 1e-8
_CLIP = 10.0


@dataclass(frozen=True)
class Rates:
    """Learning rates of AdamW's steps without weight decay."""

    day: float
    """Of the day's own layer."""
    shared: float
    """Of what all days share."""
    adapter: float = 0.0
    """Of the factors of a change of low rank."""

    def of(self, moving: Moving) -> Mapping[str, float]:
        """Return the rate of each value that moves."""
        rows = {name: self.shared if row is None else self.day for name, row in moving.rows.items()}
        return rows | dict.fromkeys(moving.factors, self.adapter)


def cosine(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: from 1 at the first almost to 0.

    >>> [round(cosine(step, 4), 2) for step in range(4)]
    [1.0, 0.85, 0.5, 0.15]
    """
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class Tuner:
    """One compiled step. Nothing in it depends on the trials but the batch."""

    def __init__(
        self, config: Config, moving: Moving, rates: Rates, seed: int, dropout: bool = True
    ) -> None:
        """Prepare, and compile nothing yet."""
        days = len(config.data.sessions)
        loss_of = make_loss(config, days)
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(_CLIP),
            optax.scale_by_adam(config.optimizer.beta1, config.optimizer.beta2, _EPSILON),
        )
        by_name = rates.of(moving)
        last = jnp.asarray(config.train.steps, jnp.int32)

        def step(
            moved: Moved, moments: Any, params: Params, batch: Batch, number: jax.Array, share: Any
        ) -> tuple[Moved, Any, jax.Array]:
            drawn = step_keys(seed, number)
            keys = drawn if dropout else StepKeys(drawn.augment, None)

            def of(moved: Moved) -> jax.Array:
                return loss_of(moving.placed(params, moved), batch, keys, last)[0]

            loss, gradient = jax.value_and_grad(of)(moved)
            finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
            updates, after = self._optimizer.update(gradient, moments)
            new = {name: moved[name] - share * by_name[name] * updates[name] for name in moved}
            kept = (moved, moments)
            moved, moments = jax.tree.map(
                lambda one, old: jnp.where(finite, one, old), (new, after), kept
            )
            return moved, moments, loss

        self._step: Callable[..., tuple[Moved, Any, jax.Array]] = jax.jit(step)

    @property
    def programs(self) -> int:
        """Programs compiled so far. It stays 1 for batches of one shape."""
        return int(self._step._cache_size())  # type: ignore[attr-defined]

    def begin(self, moved: Moved) -> tuple[Moved, Any]:
        """Return the values and fresh moments, placed so that no later step compiles anew."""
        placed: tuple[Moved, Any] = jax.device_put(
            (moved, self._optimizer.init(moved)), jax.devices()[0]
        )
        return placed

    def step(
        self, moved: Moved, moments: Any, params: Params, batch: Batch, number: int, share: float
    ) -> tuple[Moved, Any, float]:
        """Take a step. A loss or gradient that is not finite changes nothing.

        Args:
          moved: the values that move.
          moments: of the optimizer.
          params: all parameters, of which those that move are not used.
          batch: of trials.
          number: of the step, of which its random numbers are a function.
          share: of the learning rates.

        Returns:
          The values and moments after it, and the loss (ln) before it.
        """
        place, scale = jnp.asarray(number, jnp.int32), jnp.asarray(share, jnp.float32)
        moved, moments, loss = self._step(moved, moments, params, batch, place, scale)
        return moved, moments, float(loss)
