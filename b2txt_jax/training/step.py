"""The pure functions that are jitted: one step of training, one of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from b2txt_jax.config import Config
from b2txt_jax.data.loader import Batch
from b2txt_jax.model.interface import Model, Params, make_model
from b2txt_jax.signal.augment import augment, augmentations
from b2txt_jax.signal.smooth import gaussian_taps, smooth
from b2txt_jax.training.ctc import ctc_loss, frames_needed
from b2txt_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Everything that training carries from step to step."""

    step: jax.Array
    """int32 [], optimizer steps done."""
    params: Params
    optimizer: Any
    ema: Params | None = None
    """Exponential moving average of `params`, with `train.ema`."""


class StepKeys(NamedTuple):
    """Random keys of one step, by what they are for."""

    augment: jax.Array
    dropout: jax.Array


class StepMetrics(NamedTuple):
    """Scalars that a training step reports, on the device."""

    loss: jax.Array
    """Mean CTC loss (ln) of the rows that can be aligned, per label with `train.ctc_per_label`."""
    gradient_norm: jax.Array
    infeasible: jax.Array
    """Rows left out since no alignment can spell their label."""
    finite: jax.Array
    """False when loss or gradient was NaN or infinite. The step then changed nothing."""
    parts: dict[str, jax.Array]
    """What the model's own loss reports, by name."""


class Rows(NamedTuple):
    """A batch without its features. With several hosts, each reads some rows and receives this of
    all."""

    bins: jax.Array
    """int32 [B]. 0 marks a row that only fills the batch."""
    day: jax.Array
    """int32 [B]."""
    labels: jax.Array
    """int32 [B, L]."""
    label_length: jax.Array
    """int32 [B]."""


class EvalOutput(NamedTuple):
    """Per row of an evaluation batch."""

    logits: jax.Array
    """float32 [B, P, C]."""
    frames: jax.Array
    """int32 [B], valid frames of 80 ms."""
    loss: jax.Array
    """float32 [B], CTC loss (ln); +inf where no alignment can spell the label."""
    rows: Rows
    aux: dict[str, jax.Array]
    """Further logits of the model, float32 [B, P, C] by name, in validation."""


def step_keys(seed: int, step: jax.Array) -> StepKeys:
    """Return keys as a function of (seed, step): resuming needs no more than the step's number."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return StepKeys(*jax.random.split(key, 2))


def model_of(config: Config, days: int) -> Model:
    """Return the configured model for `days` recording days."""
    return make_model(config.model, config.data.feature_count, days)


def init_state(config: Config, days: int) -> TrainState:
    """Return fresh parameters and optimizer state. Parameters are a function of the seed."""
    model = model_of(config, days)

    def init(key: jax.Array) -> TrainState:
        params = model.init(key)
        optimizer = make_optimizer(config.optimizer, model.group).init(params)
        ema = params if config.train.ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer, ema)

    # Jitted as a whole: op by op it would be a hundred small compilations.
    return jax.jit(init)(jax.random.key(config.train.seed))


def averaged(ema: Params | None, params: Params, step: jax.Array, decay: float) -> Params | None:
    """Return the moving average of the weights after step `step`, counted from 0.

    The decay grows as (1 + step) / (10 + step) to `decay`, so that the random weights of the start
    are soon forgotten.
    """
    if ema is None:
        return None
    done = step.astype(jnp.float32)
    new: Params = optax.incremental_update(
        params, ema, 1 - jnp.minimum(decay, (1 + done) / (10 + done))
    )
    return new


def make_train_step(
    config: Config, days: int
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Return the pure function (state, batch) -> (state, metrics). Jit it with the state donated.

    Raises:
      ConfigError: the model, the smoothing or an augmentation cannot be used.
    """
    model, signal = model_of(config, days), config.signal
    optimizer = make_optimizer(config.optimizer, model.group)
    # Bad settings raise here, before tracing.
    augmentations(signal)
    if signal.smooth_std > 0:
        gaussian_taps(signal.smooth_std, signal.smooth_size)

    def loss_of(
        params: Params, batch: Batch, keys: StepKeys, step: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        # Float32 whatever the features are stored as: noise and smoothing need its digits.
        x = jnp.asarray(batch.features, jnp.float32)
        x, bins = augment(keys.augment, x, batch.bins, signal)
        if signal.smooth_std > 0:
            x = smooth(x, signal.smooth_std, signal.smooth_size)
        x, bins = augment(keys.augment, x, bins, signal, smoothed=True)
        needed = frames_needed(batch.labels, batch.label_length)

        def mean_ctc(logits: jax.Array, frames: jax.Array) -> jax.Array:
            with jax.named_scope("ctc"):
                losses = ctc_loss(logits, frames, batch.labels, batch.label_length)
            if config.train.ctc_per_label:
                losses = losses / jnp.maximum(batch.label_length, 1)
            feasible = needed <= frames
            return jnp.where(feasible, losses, 0.0).sum() / jnp.maximum(feasible.sum(), 1)

        progress = step.astype(jnp.float32) / config.train.steps
        loss, parts = model.loss(params, x, bins, batch.day, mean_ctc, keys.dropout, progress)
        return loss, ((needed > model.frames(bins)).sum(), parts)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        keys = step_keys(config.train.seed, state.step)
        (loss, (infeasible, parts)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, batch, keys, state.step
        )
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)
            updates, moments = optimizer.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = averaged(state.ema, params, state.step, config.train.ema)
        changed = TrainState(state.step + 1, params, moments, ema)
        kept = state._replace(step=state.step + 1)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        return state, StepMetrics(loss, norm, infeasible, finite, parts)

    return train_step


def make_eval_step(
    config: Config, days: int, validating: bool = False
) -> Callable[[Params, Batch], EvalOutput]:
    """Return the pure function (params, batch) -> EvalOutput: smoothing, no augmentation, no
    dropout. `validating`: with the further logits that the model has validated."""
    model, signal = model_of(config, days), config.signal
    forward = model.validate if validating else model.apply

    def eval_step(params: Params, batch: Batch) -> EvalOutput:
        x, bins = jnp.asarray(batch.features, jnp.float32), jnp.asarray(batch.bins)
        if signal.smooth_std > 0:
            x = smooth(x, signal.smooth_std, signal.smooth_size, signal.eval_padding)
            if signal.eval_padding == "valid":
                taps = len(gaussian_taps(signal.smooth_std, signal.smooth_size))
                bins = jnp.maximum(bins - (taps - 1), 0)
        logits, frames, aux = forward(params, x, bins, batch.day)
        loss = ctc_loss(logits, frames, batch.labels, batch.label_length)
        rows = Rows(batch.bins, batch.day, batch.labels, batch.label_length)
        return EvalOutput(logits, frames, loss, rows, aux if validating else {})

    return eval_step
