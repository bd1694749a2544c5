"""`b2txt train`: the training loop around the jitted step."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from b2txt_jax.config import (
    CONFIG_FILE,
    Config,
    ConfigError,
    differences,
    load_config,
    read_written_config,
    resumable_keys,
    with_overrides,
    write_config,
)
from b2txt_jax.data.description import DataError
from b2txt_jax.data.fingerprint import check_same_data, fingerprint, short, write_fingerprint
from b2txt_jax.data.joint import absolute
from b2txt_jax.data.loader import (
    MUCH_PADDING,
    EvaluationData,
    TrainingData,
    configured_sessions,
    resolve_buckets,
)
from b2txt_jax.data.reader import session_widths
from b2txt_jax.model.interface import Params, compute_dtype, parameter_count
from b2txt_jax.provenance import hardware, provenance
from b2txt_jax.training.checkpoint import EMA, RAW, BestScore, Checkpoints, has_checkpoint
from b2txt_jax.training.compiled import CompiledSteps, used_buckets
from b2txt_jax.training.distributed import (
    Spacing,
    is_first,
    join_hosts,
    stop_on_signals,
    wait_for_all,
)
from b2txt_jax.training.experiment_log import (
    add_tracker_argument,
    check_tracker,
    experiment,
)
from b2txt_jax.training.lock import WorkdirInUseError, locked
from b2txt_jax.training.metrics_log import (
    METRICS_FILE,
    MetricsLog,
    mean_of_last,
    read_metrics,
    validation_pers,
)
from b2txt_jax.training.sharding import DATA, make_mesh, sharded_state
from b2txt_jax.training.step import TrainState, model_of, packing_rules
from b2txt_jax.training.tracker import PER_KEYS, Tracker, percent, progress_bar
from b2txt_jax.training.validation import validate
from b2txt_jax.training.warm_start import check_not_pretrained, warm_started
from b2txt_jax.training.word_errors import LAST_SECONDS, Decoder, decoder_of
from lm_server.files.atomic_file import regular, replacing
from lm_server.process import finishing, leave

FINISHED_FILE = "finished.json"
"""Name in a run's folder of a complete run: all steps done, or stopped by train.patience."""

CALLS_FILE = "calls.jsonl"
"""Name in a run's folder of the record of each call that trained: what, when, from which code."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """End of a call of `train`."""

    step: int
    best: BestScore | None
    finished: bool
    """False when a signal stopped it early."""
    stopped_by: int | None = None
    """The signal that stopped it."""
    compiled: bool = True
    """False when it was stopped before the first step. Threads may then go on compiling."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt train`."""
    parser.add_argument(
        "--config",
        help="name of a configuration (demo) or its file; a folder that holds a run has its own",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several hosts: a TPU slice, SLURM, or as JAX_COORDINATOR_ADDRESS says",
    )
    add_tracker_argument(parser)
    parser.epilog = (
        "Any key of the configuration: --config.section.key=value. Called again with the same "
        "--workdir, training goes on where it stopped. SIGTERM saves and exits 0; "
        "WORKDIR/finished.json is there once all steps are done."
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt train`."""
    if args.distributed:
        join_hosts()
    if args.config is not None:
        config = load_config(args.config, args.overrides)
    else:
        config = with_overrides(read_written_config(args.workdir / CONFIG_FILE), args.overrides)
    result = train(config, args.workdir, tracker=args.tracker)
    # Preemption is no failure: everything is saved. An interrupt by the user is one.
    status = 130 if result.stopped_by == signal.SIGINT and not result.finished else 0
    if not result.compiled:
        leave(status)  # The threads that compile cannot be stopped.
    return status


def resolve(config: Config, workdir: Path, resumed: bool) -> Config:
    """Fill in the list of sessions, the buckets and the absolute root. With `resumed`, check that
    it is the same run.

    Raises:
      ConfigError: the folder holds a run with another configuration.
      DataError: there are no sessions.
    """
    path = workdir / CONFIG_FILE
    before = read_written_config(path) if resumed else None
    sessions = config.data.sessions or (before.data.sessions if before else ())
    sessions = sessions or configured_sessions(config.data)
    widths = config.data.widths or (before.data.widths if before else ())
    widths = widths or session_widths(config.data.root, sessions, config.data.feature_count)
    if widths and len(widths) != len(sessions):
        raise ConfigError(
            f"configuration key data.widths has {len(widths)} numbers for {len(sessions)} "
            "sessions; needed one for each, or () to take them from the data"
        )
    data = dataclasses.replace(
        config.data, sessions=sessions, widths=widths, root=absolute(config.data.root)
    )
    if not data.buckets:
        chosen = before.data.buckets if before else resolve_buckets(data, data.sessions)
        data = dataclasses.replace(data, buckets=chosen)
    config = dataclasses.replace(config, data=data)
    changed = differences(before, config) if before else {}
    for key in resumable_keys(config):
        changed.pop(key, None)
    if changed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            f"{workdir} holds a run with another configuration: {listed}. Give a new --workdir, or "
            "the same values to go on with that run"
        )
    return config


def train(
    config: Config, workdir: Path, console: Console | None = None, tracker: str | None = None
) -> TrainResult:
    """Train to `config.train.steps`, from the latest checkpoint in `workdir` if there is one.

    Args:
      config: of the run.
      workdir: its folder.
      console: prints what happens.
      tracker: service that gets the metrics too, one of `experiment_log.TRACKERS`.

    Raises:
      TrackerError: the tracker cannot be used.
      ConfigError, DataError, PlanError, CheckpointError: see their modules.
      TrainingError: a loss or gradient was not finite.
      WorkdirInUseError: another training runs in `workdir`.
    """
    console = console or Console(quiet=not is_first())
    check_not_pretrained(workdir)
    check_tracker(tracker)
    resumed = has_checkpoint(workdir)
    asked, config = config, resolve(config, workdir, resumed)
    fixed = [key for key in differences(asked, config) if key not in resumable_keys(config)]
    if resumed and fixed:
        console.print(
            f"{' and '.join(fixed)} stay as {workdir / CONFIG_FILE} has them: () chooses them at "
            "the start of a run only. For others give a new --workdir",
            soft_wrap=True,
        )
    sessions, days = config.data.sessions, len(config.data.sessions)
    least, frames = config.model.least_bins, model_of(config, days).frames
    mesh = make_mesh(config.parallel.model_axis)
    training = TrainingData(
        config.data,
        sessions,
        least,
        frames,
        packing_rules(config, days, mesh.shape[DATA]),
        (config.train.seed, config.train.steps),
        config.signal,
    )
    validation = EvaluationData(
        config.data, sessions, "val", least, labels=True, signal=config.signal
    )
    if not any(ref.label_length for ref in validation.refs):
        raise DataError(
            f"the {len(validation.refs)} validation trials in {config.data.root} have no phoneme "
            "in any label; needed labels to score against: check data.root"
        )
    steps = CompiledSteps(config, days, mesh, training.features_dtype)

    trained_on = [ref for refs in training.refs_of_day for ref in refs]
    data = fingerprint(training.reader, [*trained_on, *validation.refs])
    if resumed:
        check_same_data(workdir, data)
    without = [name for name, refs in zip(sessions, training.refs_of_day, strict=True) if not refs]
    if without:
        names = ", ".join(without)
        console.print(f"no training trials in {names}: their day layers stay untrained")
    with contextlib.ExitStack() as stack:
        decoder = None
        if is_first():
            decoder = stack.enter_context(decoder_of(config, workdir, validation))
        # Not earlier: a mistake found above leaves no folder behind.
        workdir.mkdir(parents=True, exist_ok=True)
        # One host holds the lock for all; the others wait for it at the first collective operation.
        if is_first():
            stack.enter_context(locked(workdir))
        if has_checkpoint(workdir) != resumed:
            raise WorkdirInUseError(
                f"another training has just saved in {workdir}: start the same command again to go "
                "on from there, or give another --workdir"
            )
        if is_first():
            write_fingerprint(workdir, data)
            _record_call(workdir, short(data))
        return _train_in(
            config, workdir, console, mesh, steps, training, validation, resumed, decoder, tracker
        )


def _record_call(workdir: Path, data: str) -> None:
    with regular(workdir / CALLS_FILE).open("a") as file:
        file.write(json.dumps({**provenance(), "hardware": hardware(), "data": data}) + "\n")


def _train_in(
    config: Config,
    workdir: Path,
    console: Console,
    mesh: Mesh,
    steps: CompiledSteps,
    training: TrainingData,
    validation: EvaluationData,
    resumed: bool,
    decoder: Decoder | None,
    tracking: str | None,
) -> TrainResult:
    """Run `train` in a folder that exists and is locked."""
    days = len(config.data.sessions)
    if is_first():
        write_config(config, workdir / CONFIG_FILE)

    with (
        Checkpoints(workdir, ema=config.train.ema > 0) as checkpoints,
        stop_on_signals() as stopping,
        contextlib.ExitStack() as stack,
    ):
        state = sharded_state(config, days, mesh)
        best: BestScore | None = None
        if resumed:
            state, best = checkpoints.restore_latest(state)
        elif config.train.warm_start:
            state, said = warm_started(state, config)
            console.print(f"weights at the start: {said}", soft_wrap=True)
        first = int(state.step)
        trials = sum(len(refs) for refs in training.refs_of_day)
        console.print(
            f"{days} sessions, {trials} training and {len(validation.refs)} validation trials; "
            f"{parameter_count(state.params):,} parameters; products in "
            f"{compute_dtype(config.model)} on {jax.device_count()} {jax.default_backend()} "
            f"device(s)"
        )
        if config.data.plan == "epochs":
            rows = config.data.batch_rows
            console.print(
                f"an epoch is {trials / rows:.4g} batches of {rows}; its last batch is completed "
                "with the first trials of the next epoch"
            )
        warmup = config.optimizer.warmup_steps
        if config.train.steps <= warmup:
            console.print(
                f"the learning rate still rises at the end: optimizer.warmup_steps is {warmup} and "
                f"train.steps {config.train.steps}"
            )
        if first >= config.train.steps or out_of_patience(config, best):
            asked = f"{config.train.steps} are asked for"
            if first < config.train.steps:
                asked = f"{config.train.patience} validations found nothing better (train.patience)"
            console.print(f"{workdir} has done {first} steps; {asked}")
            if is_first() and not (workdir / FINISHED_FILE).exists():
                _write_finished(workdir, first, best)  # killed between the last save and this file
            return TrainResult(first, best, finished=True)
        if first:
            console.print(f"going on from step {first} of {config.train.steps} in {workdir}")
        if is_first():
            (workdir / FINISHED_FILE).unlink(missing_ok=True)
        log = None
        if is_first():
            sent = stack.enter_context(experiment(tracking, workdir, config, console))
            log = stack.enter_context(MetricsLog(workdir, first, sent))
        checkpoints.prepare(state)
        if not _compile(steps, config, training, validation, console, stopping):
            console.print(f"stopped before step {first + 1}: the same command starts again there")
            return TrainResult(first, best, False, stopping(None), compiled=False)
        wait_for_all("compiled")
        stopped_by = None
        with (
            finishing("the step under way, a validation that is due, and the saving of the state"),
            progress_bar(console) as progress,
        ):
            tracker = Tracker(config, training, log, progress, first, best)
            batches = training.batches(
                config.train.seed, first, config.train.steps, steps.local_train_rows
            )
            spacing = Spacing(config.train.save_seconds)
            for batch in steps.ahead(batches):
                state, metrics = steps.train_step(state, batch)
                tracker.started(metrics)
                step = tracker.step
                for outcome in decoder.finished() if decoder else ():
                    tracker.decoded(outcome)
                done = step == config.train.steps
                if done or step % config.train.validate_every == 0:
                    tracker.drain()
                    tracker.pause()
                    started = time.monotonic()
                    logits: dict[str, dict[int, np.ndarray]] = {}
                    results = [
                        validate(
                            steps.eval_step,
                            weights,
                            validation,
                            steps.local_eval_rows,
                            logits.setdefault(name, {}) if decoder else None,
                        )
                        for name, weights in ((RAW, state.params), (EMA, state.ema))
                        if weights is not None
                    ]
                    if decoder:
                        # Indexed by trial; batches are in another order.
                        decoder.submit(
                            step,
                            {
                                name: [some[n] for n in sorted(some)]
                                for name, some in logits.items()
                            },
                        )
                    seconds = time.monotonic() - started
                    for name in tracker.validated(results[0], seconds, *results[1:]):
                        weights, score = _of_weights(name, state, tracker.best)
                        checkpoints.save_best(step, weights, score, name)
                    done = done or out_of_patience(config, tracker.best)
                stopped_by = stopping(step)
                planned = step % config.train.save_every == 0
                if done or stopped_by or (planned and spacing.due()):
                    tracker.drain()
                    checkpoints.save_latest(step, state, tracker.best)
                if done or stopped_by:
                    break
            tracker.drain()
            checkpoints.wait()
        early = out_of_patience(config, tracker.best)
        finished = early or tracker.step >= config.train.steps
        if finished and is_first():
            _write_finished(workdir, tracker.step, tracker.best, tracker)
        if early and tracker.step < config.train.steps:
            console.print(
                f"stopped at step {tracker.step}: {config.train.patience} validations in a row "
                "found nothing better (train.patience)"
            )
        if decoder:
            _last_word_errors(decoder, tracker, console, finished, stopping)
        _print_end(console, config, workdir, tracker, finished)
        return TrainResult(tracker.step, tracker.best, finished, stopped_by)


def _last_word_errors(
    decoder: Decoder,
    tracker: Tracker,
    console: Console,
    finished: bool,
    stopping: Callable[[int | None], int | None],
) -> None:
    """Log what was decoded. At the end of a complete run, wait for the last validation."""
    until = time.monotonic() + (LAST_SECONDS if finished else 0.0)
    done = decoder.wait(0.0)
    if not done and finished:
        console.print("waiting for the WER of the last validation; everything is saved")
    while not done and time.monotonic() < until and stopping(None) is None:
        done = decoder.wait(0.2)
    for outcome in decoder.finished():
        tracker.decoded(outcome)
    missing = tracker.undecoded + decoder.replaced + (not done)
    if missing:
        console.print(
            f"{missing} validations have no WER: {decoder.replaced} gave way to a newer one while "
            f"the decoder was busy, {tracker.undecoded} failed, {int(not done)} was under way at "
            f"the end; the decoder died {decoder.died} times",
            soft_wrap=True,
        )


def _of_weights(name: str, state: TrainState, best: BestScore | None) -> tuple[Params, BestScore]:
    """Return the weights RAW or EMA of a state with averages, and their best score."""
    score = best.ema if best and name == EMA else best
    weights = state.ema if name == EMA else state.params
    assert score is not None
    assert weights is not None
    return weights, score


def out_of_patience(config: Config, best: BestScore | None) -> bool:
    """Return whether `train.patience` validations in a row found nothing better than `best`."""
    if not config.train.patience or best is None:
        return False
    scores = [best, best.ema] if best.ema else [best]
    return min(score.validations_since for score in scores) >= config.train.patience


def _compile(
    steps: CompiledSteps,
    config: Config,
    training: TrainingData,
    validation: EvaluationData,
    console: Console,
    stopping: Callable[[int | None], int | None],
) -> bool:
    """Compile every bucket that batches can fall into, before the first step.

    Return whether all are compiled. A signal ends it earlier.
    """
    train = training.shapes.share
    evaluate = used_buckets(validation.refs, config.data.buckets)
    programs = len(train) + len(evaluate)
    shown = ", ".join(f"{shape} ({share:.0%})" for shape, share in train.items())
    started = time.monotonic()
    console.print(f"compiling {programs} programs, for batches of (bins x labels) {shown} ...")
    if training.packed:
        console.print(
            f"short trials share rows (data.packing): {training.padding:.0%} of a batch's bins are "
            "padding"
        )
    elif training.padding > MUCH_PADDING:
        console.print(
            f"warning: {training.padding:.0%} of a batch's bins are padding, since data.buckets do "
            "not suit these trials: leave it empty (data.buckets = ()) and they are chosen from "
            "the lengths",
            style="yellow",
        )
    done = 0

    def compiled() -> None:
        nonlocal done
        done += 1
        console.print(f"  {done} of {programs} after {time.monotonic() - started:.0f} s")

    return steps.compile(train, evaluate, compiled, lambda: stopping(None) is not None)


def _write_finished(
    workdir: Path, step: int, best: BestScore | None, tracker: Tracker | None = None
) -> None:
    """Write the file of a complete run. What only the bookkeeper of its last call knows is None
    without it."""
    metrics = workdir / METRICS_FILE
    entries = read_metrics(metrics) if metrics.is_file() else []
    pers = validation_pers(entries)
    values: dict[str, Any] = {
        "step": step,
        "skipped_steps": tracker and tracker.skipped,
        "validations": len(pers),
        "per_last_ten": mean_of_last(pers),
    }
    if best is not None and best.ema is not None:
        values["ema_per_last_ten"] = mean_of_last(validation_pers(entries, PER_KEYS[EMA]))
    if best is not None:
        values["best"] = dataclasses.asdict(best)
    with replacing(workdir / FINISHED_FILE) as unfinished:
        unfinished.write_text(json.dumps(values, indent=2) + "\n")


def _print_end(
    console: Console, config: Config, workdir: Path, tracker: Tracker, finished: bool
) -> None:
    if tracker.skipped:
        console.print(f"{tracker.skipped} steps were skipped: their loss was not finite")
    if not finished:
        console.print(
            f"stopped at step {tracker.step} of {config.train.steps}; it is saved: the same "
            "command goes on from there"
        )
    elif tracker.best is not None:
        console.print(f"done: {_scores(RAW, tracker, tracker.best)}")
        if tracker.best.ema is not None:
            console.print(f"averaged weights: {_scores(EMA, tracker, tracker.best.ema)}")
        console.print(f"checkpoints and metrics in {workdir}")


def _scores(weights: str, tracker: Tracker, best: BestScore) -> str:
    pers = tracker.pers[weights]
    mean = mean_of_last(pers)
    last = "" if mean is None else f"; mean of the last ten validations {100 * mean:.2f} %"
    return (
        f"best validation PER {percent(best)} at step {best.step}, the lowest of {len(pers)}{last}"
    )
