"""The pure functions that are jitted: one step of training, one of evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from b2txt_jax.config import Config, ConfigError, ModelSettings, OptimizerConfig
from b2txt_jax.data.batches.layout import Rules
from b2txt_jax.data.loader import Batch
from b2txt_jax.model.interface import (
    Model,
    Params,
    compute_dtype,
    make_model,
    model_class,
    takes_segments,
)
from b2txt_jax.model.product import gradients_added_in
from b2txt_jax.segments import Segments
from b2txt_jax.signal.augment import augment, augmentations
from b2txt_jax.signal.augment import takes_segments as augment_takes_segments
from b2txt_jax.signal.smooth import smooth_as, taps_of
from b2txt_jax.training.ctc import ctc_loss, frames_needed, segment_logits
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
    dropout: jax.Array | None


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
    """float32 [B], CTC loss (ln), +inf where no alignment can spell the label."""
    rows: Rows
    aux: dict[str, jax.Array]
    """Further logits of the model, float32 [B, P, C] by name, in validation."""


def step_keys(seed: jax.Array | int, step: jax.Array) -> StepKeys:
    """Return keys as a function of (seed, step): resuming needs no more than the step's number."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return StepKeys(*jax.random.split(key, 2))


def model_of(config: Config, days: int) -> Model:
    """Return the configured model for `days` recording days."""
    return make_model(config.model, config.data.feature_count, days)


def packing_rules(config: Config, days: int, groups: int) -> Rules | None:
    """Return how trials of a training batch may share rows on `groups` devices. None where they
    may not.

    Raises:
      ConfigError: data.packing is "on" and the model or an augmentation cannot.
    """
    model, signal = model_of(config, days), config.signal
    if config.data.packing == "off":
        return None
    needed = []
    if not takes_segments(model):
        needed.append(f"model {config.model.name!r} takes one trial a row")
    if not augment_takes_segments(signal):
        needed.append(f"an augmentation of {signal.augment} takes one trial a row")
    if needed and config.data.packing == "on":
        raise ConfigError(
            f"configuration key data.packing is 'on', but {' and '.join(needed)}; needed 'auto' or "
            "'off', another model, or of augmentations ours without static_gain_std"
        )
    if needed:
        return None
    taps, ahead = taps_of(signal)
    reach = max(ahead, len(taps) - 1 - ahead)
    one_day = config.model.days_differ or bool(config.data.widths)
    return Rules(model.frame_bins, reach, one_day, groups)


def init_state(config: Config, days: int) -> TrainState:
    """Return fresh parameters and optimizer state. Parameters are a function of the seed."""
    kind, features = model_class(config.model.name), config.data.feature_count
    init = _init_of(kind, config.model, features, days, config.optimizer, config.train.ema > 0)
    return init(jax.random.key(config.train.seed))


# A training asks half a dozen times for a fresh state or its shapes, most of which is tracing.
@functools.lru_cache(maxsize=8)
def _init_of(
    kind: type[Model],
    settings: ModelSettings,
    features: int,
    days: int,
    optimizer: OptimizerConfig,
    averages: bool,
) -> Callable[[jax.Array], TrainState]:
    """Return the function of a key that makes the state.

    It is jitted as a whole: op by op it would be a hundred small compilations.
    """
    model = kind(settings, features, days)

    def init(key: jax.Array) -> TrainState:
        params = model.init(key)
        moments = make_optimizer(optimizer, model.group).init(params)
        ema = params if averages else None
        return TrainState(jnp.zeros((), jnp.int32), params, moments, ema)

    return jax.jit(init)


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


class _Apart(NamedTuple):
    """The N trials of a batch one by one, where rows hold one each or share them."""

    labels: jax.Array
    """int32 [N, L]."""
    label_length: jax.Array
    """int32 [N]."""
    there: jax.Array | bool
    """bool [N], False for a place without a trial."""
    frames_of_rows: Callable[[jax.Array], jax.Array]
    """Frames by row and segment -> by trial [N]."""
    of_rows: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    """Logits [B, P, C] and frames by row and segment -> logits [N, P, C], frames [N]."""


def _apart(batch: Batch, model: Model) -> _Apart:
    """Return the trials of a batch one by one.

    Every device takes the trials of its own rows: groups are an axis of their own.
    """
    if batch.slot is None:
        return _Apart(batch.labels, batch.label_length, True, lambda f: f, lambda x, f: (x, f))
    groups, trials = batch.slot.shape
    there, slot = batch.slot >= 0, jnp.maximum(batch.slot, 0)

    def of_slots(values: jax.Array) -> jax.Array:
        found: jax.Array = jnp.take_along_axis(values.reshape(groups, -1), slot, axis=1)
        return found

    def frames_of_rows(frames: jax.Array) -> jax.Array:
        return jnp.where(there, of_slots(frames), 0).reshape(-1)

    def of_rows(logits: jax.Array, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        length = logits.shape[1]
        row = slot // batch.start.shape[1]
        first = jnp.where(there, row * length + of_slots(batch.start) // model.frame_bins, 0)
        by_group = logits.reshape(groups, -1, *logits.shape[1:])
        cut = jax.vmap(segment_logits)(by_group, first)
        return cut.reshape(-1, *logits.shape[1:]), frames_of_rows(frames)

    labels = batch.labels.reshape(groups * trials, -1)
    length = batch.label_length.reshape(-1)
    return _Apart(labels, length, there.reshape(-1), frames_of_rows, of_rows)


def _own_features(x: jax.Array, day: jax.Array, widths: np.ndarray) -> jax.Array:
    """Return [B, T, D] with zeros in the features that a row's session does not have.

    Of those, noise is all there would be. `widths` [days] is empty where all have D.
    """
    if not widths.size:
        return x
    own = jnp.arange(x.shape[-1]) < jnp.asarray(widths)[day][:, None]
    return jnp.where(own[:, None, :], x, 0.0)


Loss = Callable[
    [Params, Batch, StepKeys, jax.Array], tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]
]
"""(params, batch, keys, step) -> (loss, (rows left out, parts of the loss)). Without a key there is
no dropout."""


def make_loss(config: Config, days: int) -> Loss:
    """Return the pure function that training minimises: augmentation, smoothing, model, CTC.

    Raises:
      ConfigError: the model, the smoothing or an augmentation cannot be used.
    """
    model, signal = model_of(config, days), config.signal
    # Bad settings raise here, before tracing.
    augmentations(signal)
    taps_of(signal)
    widths = np.array(config.data.widths, np.int32)
    if "channel_mask" in signal.augment and (widths < config.data.feature_count).any():
        raise ConfigError(
            f"signal.augment lists 'channel_mask', and sessions have {min(widths)} to "
            f"{config.data.feature_count} features (data.widths), whose halves are not the same: "
            "list 'speckle', which masks single features, instead"
        )

    def loss_of(
        params: Params, batch: Batch, keys: StepKeys, step: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        # Float32 whatever the features are stored as: noise and smoothing need its digits.
        x = jnp.asarray(batch.features, jnp.float32)
        segments = None if batch.slot is None else Segments(batch.start, batch.trial)
        x, bins = augment(keys.augment, x, batch.bins, signal, segments=segments)
        x = smooth_as(x, signal)
        x, bins = augment(keys.augment, x, bins, signal, smoothed=True, segments=segments)
        x = _own_features(x, batch.day, widths)
        apart = _apart(batch, model)
        needed = frames_needed(apart.labels, apart.label_length)

        def mean_ctc(logits: jax.Array, frames: jax.Array) -> jax.Array:
            with jax.named_scope("ctc"):
                logits, frames = apart.of_rows(logits, frames)
                losses = ctc_loss(logits, frames, apart.labels, apart.label_length)
            if config.train.ctc_per_label:
                losses = losses / jnp.maximum(apart.label_length, 1)
            feasible = apart.there & (needed <= frames)
            return jnp.where(feasible, losses, 0.0).sum() / jnp.maximum(feasible.sum(), 1)

        progress = step.astype(jnp.float32) / config.train.steps
        more: dict[str, Any] = {} if segments is None else {"segments": segments}
        arguments = params, x, bins, batch.day, mean_ctc, keys.dropout, progress
        loss, parts = model.loss(*arguments, **more)
        frames = apart.frames_of_rows(model.frames(bins))
        return loss, ((apart.there & (needed > frames)).sum(), parts)

    return loss_of


def make_train_step(config: Config, days: int) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Return the pure function (state, batch) -> (state, metrics). Jit it with the state donated.

    Its third argument, the seed of all draws, is train.seed by default. Traced, one program serves
    runs of several seeds.

    Raises:
      ConfigError: the model, the smoothing or an augmentation cannot be used.
    """
    optimizer = make_optimizer(config.optimizer, model_of(config, days).group)
    loss_of = make_loss(config, days)
    added_in, products = jnp.dtype(config.parallel.reduce_dtype), compute_dtype(config.model)
    if added_in.itemsize < products.itemsize:
        raise ConfigError(
            f"configuration key parallel.reduce_dtype is {added_in.name!r}, but products are in "
            f"{products.name}; needed model.dtype='bfloat16', or 'float32' for both"
        )

    def train_step(
        state: TrainState, batch: Batch, seed: jax.Array | int = config.train.seed
    ) -> tuple[TrainState, StepMetrics]:
        keys = step_keys(seed, state.step)
        with gradients_added_in(added_in):
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
    evaluated = _evaluation(config, days, validating)

    def eval_step(params: Params, batch: Batch) -> EvalOutput:
        return evaluated(params, batch, None)

    return eval_step


def make_augmented_step(
    config: Config, days: int
) -> Callable[[Params, Batch, jax.Array], EvalOutput]:
    """Return the pure function (params, batch, key) -> EvalOutput of augmented features.

    A trial keeps its frames. Where an augmentation moves it up, silence follows its end.
    """
    augmentations(config.signal)  # Bad settings raise here, before tracing.
    return _evaluation(config, days, validating=False)


def _evaluation(
    config: Config, days: int, validating: bool
) -> Callable[[Params, Batch, jax.Array | None], EvalOutput]:
    """Return (params, batch, key) -> EvalOutput. Without a key, nothing is augmented."""
    model, signal = model_of(config, days), config.signal
    forward = model.validate if validating else model.apply
    widths = np.array(config.data.widths, np.int32)

    def evaluated(params: Params, batch: Batch, key: jax.Array | None) -> EvalOutput:
        x, bins = jnp.asarray(batch.features, jnp.float32), jnp.asarray(batch.bins)
        if key is not None:
            x, _ = augment(key, x, bins, signal)
        x = smooth_as(x, signal, signal.eval_padding)
        if signal.eval_padding == "valid":
            bins = jnp.maximum(bins - (len(taps_of(signal)[0]) - 1), 0)
        if key is not None:
            x, _ = augment(key, x, bins, signal, smoothed=True)
            x = _own_features(x, batch.day, widths)
        logits, frames, aux = forward(params, x, bins, batch.day)
        loss = ctc_loss(logits, frames, batch.labels, batch.label_length)
        rows = Rows(batch.bins, batch.day, batch.labels, batch.label_length)
        return EvalOutput(logits, frames, loss, rows, aux if validating else {})

    return evaluated
