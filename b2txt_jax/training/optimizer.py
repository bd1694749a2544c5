"""AdamW with three parameter groups, warm-up and cosine decay, clipping (NEJM reference, section
4)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from b2txt_jax.config import OptimizerConfig
from b2txt_jax.model.decoder import Params

GROUPS = ("weights", "biases", "day")


def warmup_cosine(peak: float, floor: float, warmup: int, decay: int) -> optax.Schedule:
    """Learning rate by step: 0 to `peak` over `warmup` steps, a cosine to `floor` at `decay`, then
    constant.

    The first step has rate 0, as in the published schedule.
    """

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, decay - warmup), 0.0, 1.0)
        cosine = floor + (peak - floor) * 0.5 * (1 + jnp.cos(math.pi * progress))
        return jnp.where(step < warmup, peak * step / max(1, warmup), cosine)

    return rate


def parameter_groups(params: Params) -> Params:
    """Names the group of each parameter: 'day' (the day layers), 'biases' (GRU and head), 'weights'
    (and h0)."""

    def group(path: tuple[jax.tree_util.DictKey, ...], _: jax.Array) -> str:
        names = [str(entry.key) for entry in path]
        if "day" in names:
            return "day"
        return "biases" if names[-1].startswith("bias") else "weights"

    groups: Params = jax.tree_util.tree_map_with_path(group, params)
    return groups


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW per group: decay on weights and h0, none on
    biases."""
    main = warmup_cosine(
        config.learning_rate, config.learning_rate_min, config.warmup_steps, config.decay_steps
    )
    day = warmup_cosine(
        config.day_learning_rate,
        config.day_learning_rate_min,
        config.day_warmup_steps,
        config.day_decay_steps,
    )

    def adamw(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
        return optax.adamw(rate, config.beta1, config.beta2, config.epsilon, weight_decay=decay)

    groups = optax.partition(
        {
            "weights": adamw(main, config.weight_decay),
            "biases": adamw(main, 0.0),
            "day": adamw(day, config.day_weight_decay),
        },
        parameter_groups,
    )
    if config.clip_norm > 0:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), groups)
    return groups
