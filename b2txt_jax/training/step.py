"""The jitted steps: one of training, one of evaluation. What happens in them is pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from b2txt_jax.config import Config
from b2txt_jax.data.loader import Batch
from b2txt_jax.model.gru.baseline import Params
from b2txt_jax.model.network import init_params, make_apply, make_forward
from b2txt_jax.model.patches import frame_count
from b2txt_jax.signal.augment import augment
from b2txt_jax.signal.smooth import gaussian_taps, smooth
from b2txt_jax.training.ctc import ctc_loss, frames_needed
from b2txt_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Everything that training carries from step to step."""

    step: jax.Array
    """int32 [], optimizer steps done."""
    params: Params
    optimizer: Any


class StepKeys(NamedTuple):
    """Random keys of one step, by what they are for."""

    augment: jax.Array
    dropout: jax.Array


class StepMetrics(NamedTuple):
    """What a training step reports, scalars on the device."""

    loss: jax.Array
    """Mean CTC loss (ln) of the rows that can be aligned."""
    gradient_norm: jax.Array
    infeasible: jax.Array
    """Rows left out since no alignment can spell their label."""
    finite: jax.Array
    """False when loss or gradient was NaN or infinite; the step then changed nothing."""
    parts: dict[str, jax.Array]
    """Of the triple GRU: clean_loss and noisy_loss (ln), noise_rms, reversal (lambda)."""


class Rows(NamedTuple):
    """What a batch says of its rows, without features. With several hosts, each has read some rows
    and is told of all."""

    bins: jax.Array
    """int32 [B]; 0 marks a row that only fills the batch."""
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
    noisy_logits: jax.Array | None = None
    """float32 [B, P, C], what the triple GRU's adversary reads from the noise, where asked for."""


def step_keys(seed: int, step: jax.Array) -> StepKeys:
    """Keys as a function of (seed, step): resuming needs no more than the step's number."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return StepKeys(*jax.random.split(key, 2))


def init_state(config: Config, days: int) -> TrainState:
    """Fresh parameters and optimizer state; parameters are a function of the seed."""

    def init(key: jax.Array) -> TrainState:
        params = init_params(config.model, config.data.feature_count, days, key)
        optimizer = make_optimizer(config.optimizer).init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer)

    # Jitted as a whole: op by op it would be a hundred small compilations.
    return jax.jit(init)(jax.random.key(config.train.seed))


def _frames(config: Config, bins: jax.Array) -> jax.Array:
    return jnp.asarray(frame_count(bins, config.model.patch_size, config.model.patch_stride))


def make_train_step(
    config: Config, days: int
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the pure function (state, batch) -> (state, metrics); jit it with the state
    donated."""
    forward = make_forward(config.model, config.data.feature_count, days)
    adversary = config.adversary
    optimizer = make_optimizer(config.optimizer)
    signal = config.signal
    if signal.smooth_std > 0:
        gaussian_taps(signal.smooth_std, signal.smooth_size)  # tells of bad settings before tracing

    def reversal_at(step: jax.Array) -> jax.Array:
        progress = step.astype(jnp.float32) / config.train.steps
        return adversary.reversal * (2 / (1 + jnp.exp(-adversary.reversal_rate * progress)) - 1)

    def loss_of(
        params: Params, batch: Batch, keys: StepKeys, step: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        # Float32 whatever the features are stored as: noise and smoothing need its digits.
        x = jnp.asarray(batch.features, jnp.float32)
        x, bins = augment(keys.augment, x, batch.bins, signal)
        if signal.smooth_std > 0:
            x = smooth(x, signal.smooth_std, signal.smooth_size)
        # The names tell the parts apart in a compiled program and in a profile of it.
        with jax.named_scope("model"):
            reversal = reversal_at(step)
            outputs = forward(params, x, batch.day, keys.dropout, reversal)
        frames = _frames(config, bins)
        feasible = frames_needed(batch.labels, batch.label_length) <= frames
        counted = jnp.maximum(feasible.sum(), 1)

        def mean_ctc(logits: jax.Array) -> jax.Array:
            with jax.named_scope("ctc"):
                losses = ctc_loss(logits, frames, batch.labels, batch.label_length)
            return jnp.where(feasible, losses, 0.0).sum() / counted

        loss, parts = mean_ctc(outputs.logits), {}
        if outputs.noisy_logits is not None and outputs.noise is not None:
            noisy_loss = mean_ctc(outputs.noisy_logits)
            power = jnp.square(outputs.noise.astype(jnp.float32)).mean(axis=-1)
            said = jnp.arange(power.shape[1]) < frames[:, None]
            power = jnp.where(said, power, 0.0).sum() / jnp.maximum(said.sum(), 1)
            parts = {
                "clean_loss": loss,
                "noisy_loss": noisy_loss,
                "noise_rms": jnp.sqrt(power),
                "reversal": reversal,
            }
            loss = loss + adversary.noisy_weight * noisy_loss
        return loss, ((~feasible).sum(), parts)

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
        changed = TrainState(state.step + 1, params, moments)
        kept = TrainState(state.step + 1, state.params, state.optimizer)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        return state, StepMetrics(loss, norm, infeasible, finite, parts)

    return train_step


def make_eval_step(
    config: Config, days: int, adversary: bool = False
) -> Callable[[Params, Batch], EvalOutput]:
    """Returns the pure function (params, batch) -> EvalOutput: smoothing, no augmentation, no
    dropout; with what an adversary reads, if the model has one and it is asked for."""
    apply = make_apply(config.model, config.data.feature_count, days)
    forward = make_forward(config.model, config.data.feature_count, days)
    signal = config.signal

    def eval_step(params: Params, batch: Batch) -> EvalOutput:
        x, bins = jnp.asarray(batch.features, jnp.float32), jnp.asarray(batch.bins)
        if signal.smooth_std > 0:
            x = smooth(x, signal.smooth_std, signal.smooth_size, signal.eval_padding)
            if signal.eval_padding == "valid":
                taps = len(gaussian_taps(signal.smooth_std, signal.smooth_size))
                bins = jnp.maximum(bins - (taps - 1), 0)
        if adversary:
            logits, noisy_logits, _ = forward(params, x, batch.day)
        else:
            logits, noisy_logits = apply(params, x, batch.day), None
        frames = _frames(config, bins)
        loss = ctc_loss(logits, frames, batch.labels, batch.label_length)
        rows = Rows(batch.bins, batch.day, batch.labels, batch.label_length)
        return EvalOutput(logits, frames, loss, rows, noisy_logits)

    return eval_step
