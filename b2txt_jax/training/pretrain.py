"""`b2txt pretrain`: learn from recordings without labels what neural activity does next.

From each frame's state a linear map predicts the features of the bins that follow, beyond those
that smoothing mixed into the frame. Some channels of each trial are hidden from the input and must
be predicted from the others. The map is then thrown away. `b2txt train
--config.train.warm_start=RUN` starts from the other weights and trains with CTC.

It runs on one device. The same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

from b2txt_jax.config import CONFIG_FILE, Config, ConfigError, load_config, write_config
from b2txt_jax.data.fingerprint import check_same_data, fingerprint, write_fingerprint
from b2txt_jax.data.loader import Batch, TrainingData
from b2txt_jax.data.trial import SPLITS
from b2txt_jax.model.interface import Params
from b2txt_jax.signal.smooth import smooth_as, taps_of
from b2txt_jax.training.checkpoint import BestScore, Checkpoints, has_checkpoint
from b2txt_jax.training.lock import locked
from b2txt_jax.training.loop import resolve
from b2txt_jax.training.optimizer import make_optimizer
from b2txt_jax.training.step import TrainState, model_of
from b2txt_jax.training.tracker import TrainingError
from b2txt_jax.training.warm_start import PRETRAINING_FILE
from lm_server.files.atomic_file import replacing

HIDDEN = 0.3
"""Share of a trial's channels that the input lacks (the published pretraining's)."""
HEAD = "head"
"""Of a model's parameters, the linear map of states to logits: `weight [C, H]`, `bias [C]`."""
SETTINGS_FILE = "pretraining.json"
"""Name in a run's folder of what its configuration lacks: the split, and the share of channels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt pretrain`."""
    parser.add_argument("--config", required=True, help="name of a configuration, or its file")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder")
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="whose trials are used (default train)"
    )
    parser.add_argument(
        "--hidden",
        type=float,
        default=HIDDEN,
        help=f"share of channels to hide (default {HIDDEN})",
    )
    parser.epilog = "Any key of the configuration: --config.section.key=value."


def run(args: argparse.Namespace) -> int:
    """Run `b2txt pretrain`."""
    config = load_config(args.config, args.overrides)
    loss = pretrain(config, args.workdir, args.split, args.hidden, Console())
    print(
        f"{args.workdir}: squared error {loss:.4f} of z-scored features; go on with `b2txt train "
        f"--config.train.warm_start={args.workdir}`"
    )
    return 0


Step = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]


def make_pretraining_loss(
    config: Config, days: int, hidden: float
) -> Callable[[Params, Batch, jax.Array], jax.Array]:
    """Return the pure function (params, batch, key) -> mean squared error of predicted features.

    The map in `params["head"]` is [D, H] here. The target of a frame is the mean of as many bins as
    lie between frames, unsmoothed, after the last bin that smoothing mixed into the frame.

    Raises:
      ConfigError: the model does not say which bins a frame is of.
    """
    model, signal = model_of(config, days), config.signal
    stride, span = model.frame_bins, model.frame_span
    if not stride or not span:
        raise ConfigError(
            f"model {config.model.name!r} cannot be pretrained; needed one with Model.frame_bins "
            "and Model.frame_span, such as 'gru' or 'transformer'"
        )
    offset = span + taps_of(signal)[1]
    widths = np.array(config.data.widths or [config.data.feature_count] * days, np.int32)

    def loss_of(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        x = jnp.asarray(batch.features, jnp.float32)
        hide, dropout = jax.random.split(key)
        shown = jax.random.bernoulli(hide, 1 - hidden, (x.shape[0], 1, x.shape[2]))
        smoothed = smooth_as(jnp.where(shown, x, 0.0), signal)
        predicted = model.apply(params, smoothed, batch.bins, batch.day, dropout).logits
        frames = jnp.arange(predicted.shape[1])
        first = frames * stride + offset
        inside = (first + stride)[None] <= batch.bins[:, None]
        target = x[:, jnp.minimum(first[:, None] + jnp.arange(stride), x.shape[1] - 1)].mean(2)
        own = jnp.arange(x.shape[2]) < jnp.asarray(widths)[batch.day][:, None]
        counted = inside[:, :, None] & own[:, None]
        error = jnp.where(counted, jnp.square(predicted - target), 0.0)
        return error.sum() / jnp.maximum(counted.sum(), 1)

    return loss_of


def make_pretraining_step(config: Config, days: int, hidden: float) -> Step:
    """Return the pure function (state, batch) -> (state, loss). See `make_pretraining_loss`."""
    loss_of = make_pretraining_loss(config, days, hidden)
    optimizer = make_optimizer(config.optimizer, model_of(config, days).group)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        loss, gradient = jax.value_and_grad(loss_of)(state.params, batch, key)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, moments), loss

    return step


def pretraining_state(config: Config, days: int) -> TrainState:
    """Return fresh parameters and optimizer state, with a head of zeros that predicts features."""
    model, count = model_of(config, days), config.data.feature_count

    def init(key: jax.Array) -> TrainState:
        params = model.init(key)
        states = params[HEAD]["weight"].shape[1]
        params = params | {HEAD: {"weight": jnp.zeros((count, states)), "bias": jnp.zeros(count)}}
        optimizer = make_optimizer(config.optimizer, model.group).init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer)

    # Jitted as a whole: each array has memory of its own, which the step may reuse.
    return jax.jit(init)(jax.random.key(config.train.seed))


def pretrain(
    config: Config,
    workdir: Path,
    split: str = "train",
    hidden: float = HIDDEN,
    console: Console | None = None,
) -> float:
    """Train to `config.train.steps` on a split's features alone.

    Returns:
      The mean squared error at the end. Where nothing can be predicted it is the variance of the
      targets, which are means of several bins.

    Raises:
      ConfigError: the model cannot be pretrained, or the folder holds another run.
      DataError: there is no trial, one cannot be read, or the run began with other data.
      TrainingError: the error was not finite.
    """
    if not 0 <= hidden < 1:
        raise ConfigError(f"--hidden is {hidden}; needed 0 <= share of channels < 1")
    resumed = has_checkpoint(workdir)
    if resumed and not (workdir / PRETRAINING_FILE).is_file():
        raise ConfigError(f"{workdir} holds a trained run; needed another --workdir to pretrain in")
    settings = {"split": split, "hidden": hidden}
    if resumed:
        _check_same_settings(workdir / SETTINGS_FILE, settings)
    config = resolve(config, workdir, resumed)
    days, train = len(config.data.sessions), config.train
    model = model_of(config, days)
    step_of = jax.jit(make_pretraining_step(config, days, hidden), donate_argnums=0)
    data = TrainingData(
        config.data,
        config.data.sessions,
        config.model.least_bins,
        model.frames,
        signal=config.signal,
        split=split,
        labels_needed=False,
    )
    used = fingerprint(data.reader, [ref for refs in data.refs_of_day for ref in refs])
    if resumed:
        check_same_data(workdir, used)
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir), Checkpoints(workdir) as checkpoints:
        write_config(config, workdir / CONFIG_FILE)
        write_fingerprint(workdir, used)
        with replacing(workdir / SETTINGS_FILE) as unfinished:
            unfinished.write_text(json.dumps(settings) + "\n")
        state = pretraining_state(config, days)
        if resumed:
            state, _ = checkpoints.restore_latest(state)
        first, mean = int(state.step), float("nan")
        losses: list[jax.Array] = []
        batches = data.batches(train.seed, first, train.steps)
        shown = track(batches, "pretraining", train.steps - first, console=console)
        logged = _logged(workdir / PRETRAINING_FILE, first)
        if logged:
            mean = logged[-1]["loss"]
        with (workdir / PRETRAINING_FILE).open("w") as log:
            log.writelines(json.dumps(one) + "\n" for one in logged)
            for step, batch in enumerate(shown, start=first + 1):
                state, loss = step_of(state, batch)
                losses.append(loss)
                if step % train.log_every == 0 or step == train.steps:
                    mean = float(np.mean([float(one) for one in losses]))
                    losses.clear()
                    if not np.isfinite(mean):
                        raise TrainingError(
                            f"up to step {step} the error is {mean}; needed finite numbers: look "
                            "at the features, or lower optimizer.learning_rate"
                        )
                    log.write(json.dumps({"step": step, "loss": mean}) + "\n")
                if step % train.save_every == 0 or step == train.steps:
                    checkpoints.save_latest(step, state, None)
        # As a trained run: with a head for logits, which has learned nothing.
        fresh = model.init(jax.random.key(train.seed))[HEAD]
        score = BestScore(float("inf"), mean, int(state.step))
        checkpoints.save_best(int(state.step), {**state.params, HEAD: fresh}, score)
        checkpoints.wait()
    return mean


def _check_same_settings(path: Path, now: Mapping[str, object]) -> None:
    """Check that a run goes on with its split and share. A run of before they were kept has none.

    Raises:
      ConfigError: one is another.
    """
    before = json.loads(path.read_bytes()) if path.is_file() else now
    if before != now:
        raise ConfigError(
            f"{path.parent} was pretrained with --split {before['split']} --hidden "
            f"{before['hidden']:g}, and this is --split {now['split']} --hidden {now['hidden']:g}; "
            "needed the same to go on with it, or another --workdir"
        )


def _logged(path: Path, last: int) -> list[dict[str, float]]:
    """Return what was logged up to a step. Later lines are of steps that are done again.

    A call that was killed may have left a part of a line.
    """
    found: list[dict[str, float]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [one for one in found if one["step"] <= last]
