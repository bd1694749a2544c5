"""JSON lines that are written one by one, so that an interrupted run resumes from them.

`OUT.unfinished` has a first line {"inputs": {name: fingerprint}} and then a line per answer, in any
order. `OUT` appears whole at the end, in the order of the trials.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lm_server.errors import UserError
from lm_server.files.atomic_file import replacing


class ResumeError(UserError):
    """An interrupted run that cannot be resumed."""


class Resumable:
    """The answers of a run so far.

    Attributes:
      done: trials with an answer that is kept.
    """

    def __init__(self, path: Path, file: BinaryIO, inputs: Mapping[str, str]) -> None:
        self.path, self._file = path, file
        self._places: dict[str, int] = {}
        header: dict[str, str] = {}
        end = 0
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                break  # cut by a power failure or SIGKILL
            found = _object(path, line)
            if not end:
                header = found.get("inputs", {})
            elif found.get("problem") is None:
                self._places[found["trial"]] = end
            end += len(line)
        if self._places and header != inputs:
            other = sorted(
                name for name in {*inputs, *header} if inputs.get(name) != header.get(name)
            )
            raise ResumeError(
                f"{path} has {len(self._places)} answers of an interrupted run with another "
                f"{', '.join(other)}: repeat the command of that run to finish it, or give "
                "--restart to decode all trials again"
            )
        file.truncate(end if self._places else 0)
        if not self._places:
            self._append({"inputs": dict(inputs)})
        self.done = frozenset(self._places)

    def add(self, answer: Mapping[str, Any]) -> None:
        """Write an answer with its `trial`."""
        self._places[answer["trial"]] = self._append(answer)

    def finish(self, out: Path, trials: Iterable[str]) -> None:
        """Write `out`: the answers that there are, in the order of the trials."""
        with replacing(out) as temporary, temporary.open("wb") as output:
            for trial in trials:
                if trial in self._places:
                    self._file.seek(self._places[trial])
                    output.write(self._file.readline())
        self.path.unlink()

    def interrupted(self) -> None:
        """Name on the error output where the answers are. Leave no file without any."""
        if not self._places:
            self.path.unlink(missing_ok=True)
            return
        print(
            f"{len(self._places)} answers are in {self.path}: the same command goes on from there",
            file=sys.stderr,
        )

    def _append(self, value: Mapping[str, Any]) -> int:
        place = self._file.seek(0, 2)
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        return place


@contextlib.contextmanager
def resumable(out: Path, inputs: Mapping[str, str], restart: bool = False) -> Iterator[Resumable]:
    """Yield the answers of the interrupted run to `out`, if there was one with the same inputs.

    Args:
      out: the file to write.
      inputs: fingerprints of everything that the answers depend on, by name.
      restart: drop what an interrupted run has written.

    Raises:
      ResumeError: the answers are of other inputs, or another process is writing them.
      OSError: the file cannot be written.
    """
    path = out.with_name(out.name + ".unfinished")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResumeError(
                f"another process is writing {path}: wait for its end, or choose another --out"
            ) from error
        if restart:
            file.truncate(0)
        yield Resumable(path, file, inputs)


def _object(path: Path, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ResumeError(
            f"{path} has a line that is no JSON ({error}): give --restart to decode all trials "
            "again"
        ) from error
    if not isinstance(found, dict) or not found.keys() & {"inputs", "trial"}:
        raise ResumeError(f"{path} is no file of an interrupted run: remove it, or give --restart")
    return found
