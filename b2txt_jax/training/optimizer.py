"""AdamW with three parameter groups, warm-up, cosine or step decay, and clipping (NEJM reference,
section 4).

The published model keeps each day's layer in parameters of its own, and PyTorch leaves a parameter
without a gradient as it is: moments, number of steps and value. Here all days are rows of one
array, so the group of the days does the same row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from b2txt_jax.config import OptimizerConfig
from b2txt_jax.model.interface import Params


def warmup_cosine(peak: float, floor: float, warmup: int, decay: int) -> optax.Schedule:
    """Return the learning rate by step: 0 to `peak` over `warmup` steps, a cosine to `floor` at
    `decay`, then constant.

    The first step has rate 0, as in the published schedule.
    """

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, decay - warmup), 0.0, 1.0)
        cosine = floor + (peak - floor) * 0.5 * (1 + jnp.cos(math.pi * progress))
        return jnp.where(step < warmup, peak * step / max(1, warmup), cosine)

    return rate


def warmup_steps(
    peak: float, warmup: int, decay_at: Sequence[int], factor: float
) -> optax.Schedule:
    """Return the learning rate by step: 0 to `peak` over `warmup` steps, then `peak`, multiplied by
    `factor` from each of the steps `decay_at` on."""
    steps = optax.piecewise_constant_schedule(1.0, dict.fromkeys(decay_at, factor))

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        return peak * steps(step) * jnp.where(step < warmup, step / max(1, warmup), 1.0)

    return rate


class AdamByDayState(NamedTuple):
    """Moments of the days' rows, and the number of updates of each day."""

    steps: jax.Array
    """int32 [days]."""
    mu: Params
    nu: Params


def scale_by_adam_by_day(
    beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> optax.GradientTransformation:
    """Return Adam with decoupled weight decay for arrays [days, ...]. Days without a gradient stay
    as they are.

    A day is without one when its gradient is zero in every array: no trial of the batch was of
    that day.
    """

    def by_row(values: jax.Array, like: jax.Array) -> jax.Array:
        return values.reshape(-1, *[1] * (like.ndim - 1))

    def init(params: optax.Params) -> AdamByDayState:
        leaves = jax.tree.leaves(params)
        days = leaves[0].shape[0] if leaves else 1  # checkpoints hold no empty array
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamByDayState(jnp.zeros(days, jnp.int32), zeros, zeros)

    def update(
        gradient: optax.Updates, state: AdamByDayState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdamByDayState]:
        if not jax.tree.leaves(gradient):  # a model without parameters of this group
            return gradient, state
        touched = [(g != 0).any(tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradient)]
        present = jnp.stack(touched).any(0)
        steps = state.steps + present

        def mean(beta: float, old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(by_row(present, old), beta * old + (1 - beta) * new, old)

        def change(m: jax.Array, v: jax.Array, value: jax.Array) -> jax.Array:
            done = jnp.maximum(by_row(steps, m), 1).astype(jnp.float32)
            m, v = m / (1 - beta1**done), v / (1 - beta2**done)
            moved = m / (jnp.sqrt(v) + epsilon) + weight_decay * value
            return jnp.where(by_row(present, m), moved, 0)

        mu = jax.tree.map(lambda old, g: mean(beta1, old, g), state.mu, gradient)
        nu = jax.tree.map(lambda old, g: mean(beta2, old, g * g), state.nu, gradient)
        return jax.tree.map(change, mu, nu, params), AdamByDayState(steps, mu, nu)

    return optax.GradientTransformation(init, update)


def learning_rates(config: OptimizerConfig) -> tuple[optax.Schedule, optax.Schedule]:
    """Return the learning rate by step, and that of the day layers."""

    def schedule(peak: float, floor: float, warmup: int, decay: int) -> optax.Schedule:
        if config.schedule == "steps":
            return warmup_steps(peak, warmup, config.decay_at, config.decay_factor)
        return warmup_cosine(peak, floor, warmup, decay)

    main = schedule(
        config.learning_rate, config.learning_rate_min, config.warmup_steps, config.decay_steps
    )
    day = schedule(
        config.day_learning_rate,
        config.day_learning_rate_min,
        config.day_warmup_steps,
        config.day_decay_steps,
    )
    return main, day


def make_optimizer(
    config: OptimizerConfig, group: Callable[[str, Any], str]
) -> optax.GradientTransformation:
    """Return clipping by the global norm, then AdamW per group.

    `group` names the group of a parameter by its path such as `gru/bias_ih_l0`, as `Model.group`
    does: 'weights' decay, 'biases' do not, 'day' is updated day by day.
    """
    main, day = learning_rates(config)

    def adamw(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
        return optax.adamw(rate, config.beta1, config.beta2, config.epsilon, weight_decay=decay)

    def named_group(path: tuple[Any, ...], leaf: jax.Array) -> str:
        return group(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    groups = optax.partition(
        {
            "weights": adamw(main, config.weight_decay),
            "biases": adamw(main, 0.0),
            "day": optax.chain(
                scale_by_adam_by_day(
                    config.beta1, config.beta2, config.epsilon, config.day_weight_decay
                ),
                optax.scale_by_learning_rate(day),
            ),
        },
        lambda params: jax.tree_util.tree_map_with_path(named_group, params),
    )
    if config.clip_norm > 0:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), groups)
    return groups
