"""`b2txt train`: the training loop around the jitted step."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from b2txt_jax.config import (
    CONFIG_FILE,
    Config,
    ConfigError,
    differences,
    load_config,
    read_written_config,
    with_overrides,
    write_config,
)
from b2txt_jax.data.loader import EvaluationData, TrainingData, configured_sessions
from b2txt_jax.errors import UserError
from b2txt_jax.model.decoder import compute_dtype, parameter_count
from b2txt_jax.model.patches import frame_count
from b2txt_jax.training.checkpoint import BestScore, Checkpoints, has_checkpoint
from b2txt_jax.training.metrics_log import MetricsLog
from b2txt_jax.training.step import (
    StepMetrics,
    init_state,
    make_eval_step,
    make_train_step,
)
from b2txt_jax.training.validation import Validation, validate

_STEPS_IN_FLIGHT = 2
# What may change between the parts of one run without making it another run.
_RESUMABLE = {
    "data.root",
    "data.eval_batch_size",
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.save_every",
}


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the text names the step and the trials."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    best: BestScore | None
    finished: bool
    """False when a signal stopped it early."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `b2txt train`."""
    parser.add_argument(
        "--config",
        help="configuration file, e.g. configs/demo.py; a folder that holds a run has its own",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder")
    parser.epilog = (
        "Any key of the configuration: --config.section.key=value. Called again with the same "
        "--workdir, training goes on where it stopped."
    )


def run(args: argparse.Namespace) -> int:
    """`b2txt train`."""
    if args.config is not None:
        config = load_config(args.config, args.overrides)
    else:
        config = with_overrides(read_written_config(args.workdir / CONFIG_FILE), args.overrides)
    result = train(config, args.workdir)
    return 0 if result.finished else 130


def resolve(config: Config, workdir: Path, resumed: bool) -> Config:
    """Fills in the list of sessions and the absolute root; `resumed`: checks that it is the same
    run.

    Raises:
      ConfigError: the folder holds a run with another configuration.
      DataError: there are no sessions.
    """
    path = workdir / CONFIG_FILE
    before = read_written_config(path) if resumed else None
    sessions = config.data.sessions or (before.data.sessions if before else ())
    data = dataclasses.replace(
        config.data,
        sessions=sessions or configured_sessions(config.data),
        root=str(Path(config.data.root).absolute()),
    )
    config = dataclasses.replace(config, data=data)
    changed = differences(before, config) if before else {}
    changed = {key: pair for key, pair in changed.items() if key not in _RESUMABLE}
    if changed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            f"{workdir} holds a run with another configuration: {listed}. Give a new --workdir, or "
            "the same values to go on with that run"
        )
    return config


def train(config: Config, workdir: Path, console: Console | None = None) -> TrainResult:
    """Trains to `config.train.steps`, going on from the latest checkpoint in `workdir` if there is
    one.

    Raises:
      ConfigError, DataError, PlanError, CheckpointError: see their modules.
      TrainingError: a loss or gradient was not finite.
    """
    console = console or Console()
    resumed = has_checkpoint(workdir)
    config = resolve(config, workdir, resumed)
    sessions = config.data.sessions
    patch = max(config.model.patch_size, 1)

    def frames_of_bins(bins: int) -> int:
        return int(frame_count(bins, config.model.patch_size, config.model.patch_stride))

    training = TrainingData(config.data, sessions, patch, frames_of_bins)
    validation = EvaluationData(config.data, sessions, "val", patch, labels=True)
    train_step = jax.jit(make_train_step(config, len(sessions)), donate_argnums=0)
    eval_step = jax.jit(make_eval_step(config, len(sessions)))

    without = [name for name, refs in zip(sessions, training.refs_of_day, strict=True) if not refs]
    if without:
        names = ", ".join(without)
        console.print(f"no training trials in {names}: their day layers stay untrained")
    # Only now: a mistake found in the data leaves no folder that another attempt would collide
    # with.
    workdir.mkdir(parents=True, exist_ok=True)
    write_config(config, workdir / CONFIG_FILE)

    with Checkpoints(workdir) as checkpoints, _stop_on_signals() as stopping:
        state = init_state(config, len(sessions))
        best: BestScore | None = None
        if resumed:
            state, best = checkpoints.restore_latest(state)
        first = int(state.step)
        trials = sum(len(refs) for refs in training.refs_of_day)
        console.print(
            f"{len(sessions)} sessions, {trials} training and {len(validation.refs)} validation "
            f"trials; {parameter_count(state.params):,} parameters; products in "
            f"{compute_dtype(config.model)} on {jax.device_count()} {jax.default_backend()} "
            f"device(s)"
        )
        if first >= config.train.steps:
            console.print(f"{workdir} has done {first} steps; {config.train.steps} are asked for")
        elif first:
            console.print(f"going on from step {first} of {config.train.steps} in {workdir}")
        with MetricsLog(workdir, first) as log, _progress(console) as progress:
            session = _Session(config, training, log, progress, first, best)
            for batch in training.batches(config.train.seed, first, config.train.steps):
                state, metrics = train_step(state, batch)
                session.started(metrics)
                step = session.step
                done = step == config.train.steps
                if done or step % config.train.validate_every == 0:
                    session.drain()
                    session.pause()
                    started = time.monotonic()
                    result = validate(eval_step, state.params, validation)
                    if session.validated(result, time.monotonic() - started):
                        assert session.best is not None
                        checkpoints.save_best(step, state.params, session.best)
                if done or stopping() or step % config.train.save_every == 0:
                    session.drain()
                    checkpoints.save_latest(step, state, session.best)
                if stopping() and not done:
                    break
            session.drain()
            checkpoints.wait()
        finished = session.step >= config.train.steps
        if not finished:
            console.print(
                f"stopped at step {session.step} of {config.train.steps}; it is saved: the same "
                f"command "
                "goes on from there"
            )
        elif session.best is not None:
            console.print(
                f"done: best validation PER {100 * session.best.per:.2f} % at step "
                f"{session.best.step}; checkpoints and metrics in {workdir}"
            )
        return TrainResult(session.step, session.best, finished)


class _Session:
    """Bookkeeping of one call of `train`: steps in flight, logs, the best score."""

    def __init__(
        self,
        config: Config,
        training: TrainingData,
        log: MetricsLog,
        progress: Progress,
        first: int,
        best: BestScore | None,
    ):
        self.step = first
        self.best = best
        self._config = config
        self._training = training
        self._log = log
        self._progress = progress
        self._pending: deque[tuple[int, StepMetrics]] = deque()
        self._window: list[tuple[float, float, int]] = []
        self._window_seconds = 0.0
        self._window_start = time.monotonic()
        self._task = progress.add_task(
            "train",
            total=config.train.steps,
            completed=first,
            loss="-",
            per=_percent(best),
            rate="-",
        )

    def started(self, metrics: StepMetrics) -> None:
        """A step was dispatched; reads the metrics of an older one, so that the device never waits
        for us."""
        self.step += 1
        self._pending.append((self.step, metrics))
        if len(self._pending) > _STEPS_IN_FLIGHT:
            self._finish(*self._pending.popleft())

    def drain(self) -> None:
        """Waits for all steps in flight."""
        while self._pending:
            self._finish(*self._pending.popleft())

    def pause(self) -> None:
        """Stops the clock of training; the next step's window starts it again."""
        self._window_seconds += time.monotonic() - self._window_start
        self._window_start = time.monotonic()

    def _finish(self, step: int, metrics: StepMetrics) -> None:
        loss, norm, infeasible, finite = (np.asarray(value).item() for value in metrics)
        if not finite:
            rows = self._training.rows(self._config.train.seed, step - 1)
            names = ", ".join(sorted({ref.name for _, ref in rows}))
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}; needed finite numbers. The "
                f"parameters "
                f"were left as before the step. Its trials: {names}. Look at their features, or "
                f"lower "
                "optimizer.learning_rate, or raise optimizer.epsilon"
            )
        self._window.append((loss, norm, infeasible))
        self._progress.update(self._task, completed=step, loss=f"{loss:.2f}")
        if step % self._config.train.log_every == 0:
            self._log_window(step)

    def _log_window(self, step: int) -> None:
        self.pause()
        losses, norms, infeasible = zip(*self._window, strict=True)
        rate = len(self._window) / self._window_seconds
        values = {
            "loss": float(np.mean(losses)),
            "gradient_norm": float(np.mean(norms)),
            "infeasible": int(sum(infeasible)),
            "steps_per_second": rate,
            "seconds": self._window_seconds,
        }
        self._log.write("train", step, values)
        self._progress.update(self._task, rate=f"{rate:.2f}")
        self._window, self._window_seconds = [], 0.0

    def validated(self, result: Validation, seconds: float) -> bool:
        """Logs a validation that took `seconds`; True when it is the best so far."""
        rate = result.per.rate
        if rate is None:
            raise TrainingError(
                f"step {self.step}: the validation split has no phoneme in any label; needed "
                f"labels to "
                "score against: check data.root"
            )
        score = BestScore(rate, result.loss, self.step)
        values: dict[str, Any] = {
            "loss": result.loss,
            "per": rate,
            "errors": result.per.errors,
            "length": result.per.length,
            "infeasible": result.infeasible,
            "seconds": seconds,
            "per_day": {day: found.rate for day, found in result.per_day.items()},
        }
        self._log.write("val", self.step, values)
        improved = score.beats(self.best)
        if improved:
            self.best = score
        self._progress.update(self._task, per=_percent(score))
        self._progress.console.print(
            f"step {self.step:>6}  val loss {result.loss:7.3f}  PER {100 * rate:6.2f} %"
            f"{'  best so far' if improved else ''}"
        )
        # Time spent in validation is not training speed.
        self._window_start = time.monotonic()
        return improved


def _percent(score: BestScore | None) -> str:
    return "-" if score is None else f"{100 * score.per:.2f} %"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  PER {task.fields[per]}  {task.fields[rate]} steps/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a flag, so that the step ends and the state is saved; a second
    one interrupts."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not in the main thread: signals stay the caller's
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
