"""Metrics of a run: JSON lines for programs, TensorBoard for people. A resumed run repeats
nothing in either."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.errors import UserError
from b2txt_jax.training.experiment_log import Experiment
from lm_server.files.atomic_file import regular, replacing


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Make a package impossible to import here, even if it is installed."""
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[package]
        else:
            sys.modules[package] = before


# It imports torch where it is installed, only to accept tensors too: two seconds and 300 MB for
# every command.
with _hidden("torch"):
    from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
LAST = 10
"""Validations whose mean PER is logged. The minimum of many validations is too good."""
_NEEDED = (
    "needed lines of JSON with `step` and `kind`: restore the file, remove the line, or move the "
    "file away (the run goes on without its past metrics)"
)


class MetricsError(UserError, RuntimeError):
    """Metrics that cannot be written or read."""


class MetricsLog:
    """Writer of `WORKDIR/metrics.jsonl` and `WORKDIR/tensorboard`."""

    def __init__(self, workdir: Path, first_step: int, experiment: Experiment | None = None):
        """Open the files. Drop entries after `first_step`, which belong to work that was lost.

        `experiment`: gets what is written too.

        Raises:
          MetricsError: the file of an earlier part of the run holds something else.
        """
        path = regular(workdir / METRICS_FILE)
        earlier = read_metrics(path) if path.exists() else []
        self.past = kept = [line for line in earlier if line["step"] <= first_step]
        """What the earlier parts of the run wrote."""
        with replacing(path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._experiment = experiment
        # TensorBoard's thread ends at a full disk; a queue with a limit would then block us.
        self._board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1, max_queue=0
        )

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line `{kind, step, **values}`. Numbers, also nested, go to TensorBoard and to
        the experiment too.

        Raises:
          MetricsError: it cannot be written, for example on a full disk.
        """
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
            # A file system in a bucket sends appended lines only now, or at the end.
            os.fsync(self._file.fileno())
        except OSError as error:
            free = shutil.disk_usage(Path(self._file.name).parent).free / 2**20
            raise MetricsError(
                f"writing the metrics of step {step} to {self._file.name} failed ({error}); "
                f"{free:.0f} MB are free there. Make room, then start the same command: it goes on "
                "from the last checkpoint"
            ) from error
        numbers = {}
        for name, value in values.items():
            nested = value.items() if isinstance(value, Mapping) else [("", value)]
            for key, number in nested:
                if isinstance(number, int | float):
                    numbers[f"{kind}/{name}/{key}" if key else f"{kind}/{name}"] = number
        for tag, number in numbers.items():
            self._board.add_scalar(tag, number, step)
        if self._experiment is not None and numbers:
            self._experiment.log(step, numbers)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A failed write fails once more on closing; the error that is being raised names it.
        quietly = contextlib.nullcontext() if kind is None else contextlib.suppress(OSError)
        with quietly:
            self._file.close()
        with quietly:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`: entries with `step`, `kind` (train, val, val_words, skipped), values.

    A last line that is not finished yet is left out: the run is still writing, or was killed.

    Raises:
      MetricsError: the file cannot be read, or a line is no JSON object with `step` and `kind`.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MetricsError(f"{path} cannot be read ({error}); {_NEEDED}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise MetricsError(f"{path} line {number} is no JSON ({error}); {_NEEDED}") from error
        known = isinstance(entry, dict) and isinstance(entry.get("kind"), str)
        if not known or type(entry.get("step")) is not int:
            raise MetricsError(f"{path} line {number} is {line[:80]!r}; {_NEEDED}")
        entries.append(entry)
    return entries


def validation_pers(entries: Iterable[Mapping[str, Any]], key: str = "per") -> list[float]:
    """Return the PER of each validation, or with "ema_per" of each of the averaged weights."""
    return [float(one[key]) for one in entries if one["kind"] == "val" and one.get(key) is not None]


def mean_of_last(pers: Sequence[float]) -> float | None:
    """Return the mean PER of the last ten validations, or of all if there were fewer. None without
    any."""
    return float(np.mean(pers[-LAST:])) if pers else None
