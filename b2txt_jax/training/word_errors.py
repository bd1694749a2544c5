"""WER of validations: `lm-server score` decodes their logits in a process beside the training.

The training never waits for it. At most one validation is being decoded and one waits, which a
newer one replaces. A process that dies costs the WER of one validation and is started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.config import Config, ConfigError
from b2txt_jax.data.loader import EvaluationData
from b2txt_jax.data.logits_file import write_logits_file
from b2txt_jax.training.checkpoint import RAW

FOLDER = "validate_lm"
"""Name in a run's folder of the place where logits wait for the decoder."""
_READY_SECONDS = 180.0
_MOST_STARTS = 4
LAST_SECONDS = 240.0
"""To wait for the last validation. JAX's other hosts wait five minutes for one that ends later."""


@dataclass(frozen=True)
class WordErrors:
    """Outcome of one validation: what `lm-server score` counted for each weights, or the problem.

    Attributes:
      step: of the validation.
      counts: weights -> its line. Empty: the decoder failed.
      problem: what went wrong, if anything did.
    """

    step: int
    counts: Mapping[str, Mapping[str, Any]]
    problem: str | None


class Decoder:
    """`lm-server score` in a process of its own, and a thread that hands it validations.

    Attributes:
      replaced: validations that were never decoded, since a newer one came first.
      died: processes that ended by themselves.
    """

    def __init__(
        self,
        lm: str,
        options: str,
        workdir: Path,
        names: Sequence[str],
        sentences: Sequence[str | None],
    ) -> None:
        """Start the process and wait until it has read the model.

        Args:
          lm: its model folder.
          options: further ones of `lm-server score`.
          workdir: the run's folder.
          names: of the validation trials.
          sentences: what was said in each.

        Raises:
          ConfigError: the process does not start, or a trial has no sentence.
        """
        unknown = [name for name, said in zip(names, sentences, strict=True) if said is None]
        if unknown:
            raise ConfigError(
                f"train.validate_lm is {lm!r}, and {len(unknown)} of {len(names)} validation "
                f"trials have no sentence to compare with, the first {unknown[0]}; needed one "
                "each, or no train.validate_lm"
            )
        try:
            more = shlex.split(options)
        except ValueError as error:
            raise ConfigError(
                f"train.validate_lm_options is {options!r} ({error}); needed options as a shell "
                "takes them"
            ) from error
        self._command = [sys.executable, "-m", "lm_server", "score", "--lm", lm, *more]
        self._folder, self._names, self._sentences = workdir / FOLDER, names, sentences
        self.replaced = self.died = 0
        self._starts = 0
        self._child: subprocess.Popen[str] | None = None
        self._waiting: tuple[int, Mapping[str, list[np.ndarray]]] | None = None
        self._busy = self._closing = False
        self._changed = threading.Condition()
        self._outcomes: queue.SimpleQueue[WordErrors] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  until close
        problem = self._start()
        if problem:
            self._errors.close()
            raise ConfigError(
                f"train.validate_lm is {lm!r}, and the decoder does not start: {problem}"
            )
        self._thread = threading.Thread(target=self._work, name="word-errors", daemon=True)
        self._thread.start()

    def submit(self, step: int, logits: Mapping[str, list[np.ndarray]]) -> None:
        """Have a validation decoded: weights -> logits of every trial. Return at once."""
        with self._changed:
            self.replaced += self._waiting is not None
            self._waiting = step, logits
            self._changed.notify_all()

    def finished(self) -> Iterator[WordErrors]:
        """Yield what was decoded since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._outcomes.get_nowait()

    def wait(self, seconds: float) -> bool:
        """Wait for what was submitted. Return whether all of it is decoded."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and not self._waiting, seconds)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        with self._changed:
            self._closing, self._waiting = True, None
            self._changed.notify_all()
        self._end()
        self._thread.join(5.0)
        self._errors.close()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _start(self) -> str | None:
        """Start the process. Return why it cannot work, None if it can."""
        self._starts += 1
        self._errors.seek(0)
        self._errors.truncate()
        # Its end of the pipe closes however we end, and the process with it. A session of its own
        # keeps Ctrl-C with us.
        self._child = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        assert self._child.stdout is not None
        if not select.select([self._child.stdout], [], [], _READY_SECONDS)[0]:
            self._end()
            return f"not ready within {_READY_SECONDS:g} s"
        return None if self._child.stdout.readline() else self._last_words()

    def _last_words(self) -> str:
        """Wait for a process that has ended. Return how, and the last line of its errors."""
        assert self._child is not None
        code = self._child.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        self._end()
        return f"{how}, {lines[-1].removeprefix('error: ')}" if lines else how

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for stream in (child.stdin, child.stdout):
            assert stream is not None
            with contextlib.suppress(OSError, ValueError):
                stream.close()

    def _work(self) -> None:
        try:
            self._work_until_closed()
        finally:
            self._end()

    def _work_until_closed(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._waiting is None:
                    return
                step, logits = self._waiting
                self._waiting, self._busy = None, True
            try:
                counts, problem = self._scored(step, logits)
            except (OSError, ValueError) as error:  # a full disk, or a pipe that `close` closed
                counts, problem = {}, str(error)
            if not self._closing:
                self._outcomes.put(WordErrors(step, counts, problem))

    def _scored(
        self, step: int, logits: Mapping[str, list[np.ndarray]]
    ) -> tuple[dict[str, dict[str, Any]], str | None]:
        if self._child is None:
            if self._starts >= _MOST_STARTS:
                return {}, f"the decoder died {self.died} times and is not started again"
            problem = self._start()
            if problem:
                return {}, f"the decoder does not start: {problem}"
        counts = {}
        for weights, some in logits.items():
            for stale in self._folder.glob("*.npz"):  # of a training that was killed
                stale.unlink()
            path = self._folder / f"{step}_{weights}.npz"
            write_logits_file(path, self._names, some, self._sentences, step=step, weights=weights)
            child = self._child
            if child is None:  # closed meanwhile
                return {}, None
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(f"{path}\n")
                    child.stdin.flush()
                found = _line_of(path, child.stdout)
            finally:
                path.unlink(missing_ok=True)
            if self._closing:
                return {}, None
            if found is None:
                self.died += 1
                left = _MOST_STARTS - self._starts
                return {}, f"the decoder died ({self._last_words()}); {left} starts are left"
            if "error" in found:
                return {}, str(found["error"])
            counts[weights] = found
        problems = [_problem(weights, found) for weights, found in counts.items()]
        return counts, "; ".join(problem for problem in problems if problem) or None


def _problem(weights: str, found: Mapping[str, Any]) -> str | None:
    """Say which trials of a validation were not decoded, or not rescored."""
    wrong = {name: found.get(name) for name in ("failed", "not_rescored") if found.get(name)}
    if not wrong:
        return None
    shown = ", ".join(f"{count} {name}" for name, count in wrong.items())
    of_weights = "" if weights == RAW else " with averaged weights"
    return f"{shown} of {found['trials']} trials{of_weights}; the first: {found['first_problem']}"


def _line_of(path: Path, lines: Iterable[str]) -> dict[str, Any] | None:
    """Return the line about a file. Skip what libraries print. None: the process has ended."""
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and found.get("file") == str(path):
                return found
    return None


@contextlib.contextmanager
def decoder_of(config: Config, workdir: Path, data: EvaluationData) -> Iterator[Decoder | None]:
    """Yield the decoder of `train.validate_lm`, None without it. It ends with the block.

    Raises:
      ConfigError: it cannot work.
    """
    train = config.train
    if not train.validate_lm:
        if train.validate_lm_options:
            raise ConfigError(
                f"train.validate_lm_options is {train.validate_lm_options!r} without a decoder; "
                "needed train.validate_lm too"
            )
        yield None
        return
    sentences = [data.reader.sample(ref).sentence for ref in data.refs]
    names = [ref.name for ref in data.refs]
    decoder = Decoder(train.validate_lm, train.validate_lm_options, workdir, names, sentences)
    try:
        yield decoder
    finally:
        decoder.close()
