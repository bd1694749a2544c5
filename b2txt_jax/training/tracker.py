"""Bookkeeping of a training run: steps in flight, logs, the best score, what the user sees."""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from collections import deque
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
)

from b2txt_jax.config import Config
from b2txt_jax.data.loader import TrainingData
from b2txt_jax.errors import UserError
from b2txt_jax.training.checkpoint import EMA, RAW, BestScore
from b2txt_jax.training.metrics_log import MetricsLog, mean_of_last, validation_pers
from b2txt_jax.training.step import StepMetrics
from b2txt_jax.training.validation import Validation
from b2txt_jax.training.word_errors import WordErrors

_STEPS_IN_FLIGHT = 2
_STEPS_BEFORE_ESTIMATE = 4


class TrainingError(UserError, RuntimeError):
    """Training that cannot go on. The text names the step and the trials."""


class Tracker:
    """Bookkeeper of one call of `train`."""

    def __init__(
        self,
        config: Config,
        training: TrainingData,
        log: MetricsLog | None,
        progress: Progress,
        first: int,
        best: BestScore | None,
    ):
        self.step = first
        self.best = best
        self.skipped = self.undecoded = 0
        self._skipped_in_window = 0
        self._config = config
        self._training = training
        self._log = log
        self._progress = progress
        past = log.past if log else []
        self.pers = {weights: validation_pers(past, key) for weights, key in PER_KEYS.items()}
        """PER of every validation, by weights."""
        self._pending: deque[tuple[int, StepMetrics]] = deque()
        self._window: list[tuple[float, float, int, dict[str, float]]] = []
        self._window_seconds = 0.0
        self._window_start = time.monotonic()
        self._finished, self._seconds = 0, 0.0
        self._validations, self._validation_seconds = 0, 0.0
        self._task = progress.add_task(
            "train",
            total=config.train.steps,
            completed=first,
            loss="-",
            per=percent(best) if best else f"after step {self._next_validation(first)}",
            rate="-",
            left="-",
        )

    def started(self, metrics: StepMetrics) -> None:
        """Note a dispatched step. Read the metrics of an older one, so that the device never waits
        for us."""
        self.step += 1
        self._pending.append((self.step, metrics))
        if len(self._pending) > _STEPS_IN_FLIGHT:
            self._finish(*self._pending.popleft())

    def drain(self) -> None:
        """Wait for all steps in flight."""
        while self._pending:
            self._finish(*self._pending.popleft())

    def pause(self) -> None:
        """Stop the clock of training. The next step's window starts it again."""
        now = time.monotonic()
        self._window_seconds += now - self._window_start
        self._seconds += now - self._window_start
        self._window_start = now

    def _next_validation(self, step: int) -> int:
        every, steps = self._config.train.validate_every, self._config.train.steps
        return min(step + every - step % every, steps)

    def _left(self, step: int) -> str:
        """Return the time that the steps and validations left will take, by those of this call."""
        # Steps after the first: that one waits for the first batches.
        self._finished += 1
        running = time.monotonic() - self._window_start
        if self._finished == 1:
            self._seconds = -running
        if self._finished < _STEPS_BEFORE_ESTIMATE:
            return "-"
        train = self._config.train
        per_step = (self._seconds + running) / (self._finished - 1)
        validations = math.ceil(train.steps / train.validate_every) - step // train.validate_every
        return time_left(
            (train.steps - step) * per_step,
            validations,
            self._validation_seconds / self._validations if self._validations else None,
        )

    def _finish(self, step: int, metrics: StepMetrics) -> None:
        loss, norm, infeasible, finite = (np.asarray(value).item() for value in metrics[:4])
        if finite:
            parts = {name: float(np.asarray(value)) for name, value in metrics.parts.items()}
            self._window.append((loss, norm, infeasible, parts))
        else:
            self._not_finite(step, loss, norm)
        self._progress.update(self._task, completed=step, loss=f"{loss:.2f}", left=self._left(step))
        if step % self._config.train.log_every == 0:
            self._log_window(step)

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        rows = self._training.rows(self._config.train.seed, step - 1)
        names = sorted({ref.name for _, ref in rows})
        found = (
            f"step {step}: loss {loss}, gradient norm {norm}; needed finite numbers. The "
            f"parameters were left as before the step. Its trials: {', '.join(names)}."
        )
        if self._config.train.on_nonfinite == "stop":
            raise TrainingError(
                f"{found} Look at their features, or lower optimizer.learning_rate, or raise "
                "optimizer.epsilon; --config.train.on_nonfinite=skip goes on without such steps"
            )
        self.skipped += 1
        self._skipped_in_window += 1
        self._progress.console.print(f"{found} Skipped ({self.skipped} so far).")
        self._write("skipped", step, {"loss": str(loss), "norm": str(norm), "trials": names})

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(kind, step, values)

    def _log_window(self, step: int) -> None:
        self.pause()
        rate = (len(self._window) + self._skipped_in_window) / self._window_seconds
        values: dict[str, Any] = {"steps_per_second": rate, "seconds": self._window_seconds}
        if self._window:
            losses, norms, infeasible, parts = zip(*self._window, strict=True)
            values |= {
                "loss": float(np.mean(losses)),
                "gradient_norm": float(np.mean(norms)),
                "infeasible": int(sum(infeasible)),
            }
            values |= {name: float(np.mean([one[name] for one in parts])) for name in parts[0]}
        if self._skipped_in_window:
            values["skipped"] = self._skipped_in_window
        self._write("train", step, values)
        self._progress.update(self._task, rate=f"{rate:.2f}")
        self._window, self._window_seconds, self._skipped_in_window = [], 0.0, 0

    def validated(
        self, result: Validation, seconds: float, averaged: Validation | None = None
    ) -> list[str]:
        """Log a validation that took `seconds`, with that of the averaged weights if there are any.

        Returns:
          The weights, RAW or EMA, whose validation is the best so far.
        """
        self._validations += 1
        self._validation_seconds += seconds
        rate = result.per.rate
        assert rate is not None  # the split has labels, as was checked before the first step
        self.pers[RAW].append(rate)
        values: dict[str, Any] = {
            "loss": result.loss,
            "per": rate,
            "per_last_ten": mean_of_last(self.pers[RAW]),
            "errors": result.per.errors,
            "length": result.per.length,
            "infeasible": result.infeasible,
            "seconds": seconds,
            "per_day": {day: found.rate for day, found in result.per_day.items()},
        }
        aux = ""
        for name, found in result.aux_per.items():
            values[f"{name}_per"] = found.rate
            aux += f"  {name} PER {100 * (found.rate or 0):6.2f} %"
        best = _better(self.best, BestScore(rate, result.loss, self.step))
        improved = [RAW] if best.step == self.step else []
        if averaged is not None and averaged.per.rate is not None:
            self.pers[EMA].append(averaged.per.rate)
            values |= {
                "ema_per": averaged.per.rate,
                "ema_per_last_ten": mean_of_last(self.pers[EMA]),
                "ema_loss": averaged.loss,
            }
            aux += f"  averaged PER {100 * averaged.per.rate:6.2f} %"
            score = BestScore(averaged.per.rate, averaged.loss, self.step)
            ema = _better(self.best.ema if self.best else None, score)
            best = dataclasses.replace(best, ema=ema)
            improved += [EMA] if ema.step == self.step else []
        self.best = best
        self._write("val", self.step, values)
        self._progress.update(self._task, per=f"{100 * rate:.2f} %")
        self._progress.console.print(
            f"step {self.step:>6}  val loss {result.loss:7.3f}  PER {100 * rate:6.2f} %{aux}"
            f"{_BEST_SO_FAR.get(tuple(improved), '')}"
        )
        # Time spent in validation is not training speed.
        self._window_start = time.monotonic()
        return improved

    def decoded(self, outcome: WordErrors) -> None:
        """Log the word errors of a validation, which may be of an earlier step."""
        values: dict[str, Any] = {}
        for weights, counts in outcome.counts.items():
            prefix = "" if weights == RAW else f"{weights}_"
            names = ("wer", "oracle_wer", "errors", "words", "failed")
            values |= {f"{prefix}{name}": counts[name] for name in names}
        if values:
            self._write("val_words", outcome.step, values)
            rates = "".join(
                f"  {name} {100 * values[key]:6.2f} %"
                for name, key in (
                    ("WER", "wer"),
                    ("n-best oracle", "oracle_wer"),
                    ("averaged WER", "ema_wer"),
                )
                if values.get(key) is not None
            )
            self._progress.console.print(f"step {outcome.step:>6}  val{rates}")
        if outcome.problem:
            self.undecoded += not values
            self._progress.console.print(
                f"warning: WER of the validation at step {outcome.step}: {outcome.problem}",
                style="yellow",
                soft_wrap=True,
            )


def time_left(training: float, validations: int, seconds: float | None) -> str:
    """Format seconds of training and of `validations` that take `seconds` each.

    `>` marks a time that lacks them, where `seconds` is None.
    """
    total = round(training + validations * (seconds or 0.0))
    at_least = ">" if validations and seconds is None else ""
    return f"{at_least}{datetime.timedelta(seconds=total)}"


PER_KEYS = {RAW: "per", EMA: "ema_per"}
"""Keys of validation lines."""
_BEST_SO_FAR = {
    (RAW,): "  best so far",
    (EMA,): "  best average so far",
    (RAW, EMA): "  both best so far",
}


def _better(best: BestScore | None, score: BestScore) -> BestScore:
    """Return the score if it beats the best one, which otherwise counts one more validation."""
    if best is None or score.beats(best):
        return score
    return dataclasses.replace(best, validations_since=best.validations_since + 1)


def percent(score: BestScore | None) -> str:
    """Format the PER. Unknown when there is no score, or one of unknown value."""
    return f"{100 * score.per:.2f} %" if score and math.isfinite(score.per) else "unknown"


def progress_bar(console: Console) -> Progress:
    """Return a bar of steps done and left, loss, PER and speed."""
    return Progress(
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  PER {task.fields[per]}  {task.fields[rate]} steps/s"),
        TextColumn("left {task.fields[left]}"),
        console=console,
    )
