"""A file of logits as `b2txt infer` writes it, read and checked."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_server.errors import DAMAGED_ARRAYS, UserError
from lm_server.protocol import CLASS_COUNT, CLASSES


class LogitsFileError(UserError, ValueError):
    """A logits file that cannot be used. Names file and field, what was found and needed."""


@dataclass(frozen=True)
class Logits:
    """A logits file in memory.

    Attributes:
      logits: float32 [all frames, 41] in the RNN's order.
      ends: int64 [trials], the frame after each trial's last.
      trials: names.
      checkpoint: what made them, as far as the file says: step, weights, parameters (a
        fingerprint), split.
    """

    logits: np.ndarray
    ends: np.ndarray
    trials: tuple[str, ...]
    checkpoint: Mapping[str, Any] = field(default_factory=dict)

    def of(self, index: int) -> np.ndarray:
        """Return the logits of one trial, [frames, 41], in the RNN's order."""
        start = self.ends[index - 1] if index else 0
        return self.logits[start : self.ends[index]]

    def select(self, trials: Sequence[int]) -> Logits:
        """Return some of the trials, by their indices."""
        parts = [self.of(index) for index in trials] or [self.logits[:0]]
        ends = np.cumsum([len(self.of(index)) for index in trials], dtype=np.int64)
        names = tuple(self.trials[index] for index in trials)
        return replace(self, logits=np.concatenate(parts), ends=ends, trials=names)

    def digest(self) -> str:
        """Return the SHA-256 of all of it."""
        found = hashlib.sha256(np.ascontiguousarray(self.logits, "<f4").tobytes())
        found.update(np.ascontiguousarray(self.ends, "<i8").tobytes())
        found.update("\n".join(self.trials).encode())
        return found.hexdigest()


def read_logits(path: Path) -> Logits:
    """Read an .npz file: `logits` float [all frames, 41], `frames` int [N], `trial` str [N].

    A file may name its `classes`, str [41], which must then be in the RNN's order.

    Raises:
      LogitsFileError: the file is missing, damaged, or one of its fields is not as needed.
    """
    if not path.is_file():
        found = "no regular file is at" if os.path.lexists(path) else "there is no logits file"
        raise LogitsFileError(f"{found} {path}: make a logits file with `b2txt infer`")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise LogitsFileError(
                f"{path} holds one array, as .npy files do; needed an .npz file with logits, "
                "frames, trial: make one with `b2txt infer`"
            )
        with archive as file:
            missing = [name for name in ("logits", "frames", "trial") if name not in file.files]
            if missing:
                raise LogitsFileError(
                    f"{path} has no field {missing[0]!r}, only {sorted(file.files)}; "
                    "needed logits, frames, trial"
                )
            logits, frames, trial = file["logits"], file["frames"], file["trial"]
            checkpoint: dict[str, Any] = {
                name: file[name].item()
                for name in ("step", "weights", "parameters", "split")
                if name in file.files and file[name].shape == ()
            }
            classes = file["classes"] if "classes" in file.files else np.array(CLASSES)
    except LogitsFileError:
        raise
    except DAMAGED_ARRAYS as error:
        raise LogitsFileError(
            f"{path} is no readable .npz file ({error}): make it again with `b2txt infer`"
        ) from error
    if logits.ndim != 2 or logits.shape[1] != CLASS_COUNT or logits.dtype.kind != "f":
        raise LogitsFileError(
            f"{path}: logits are {logits.dtype} {logits.shape}; "
            f"needed float32 [all frames, {CLASS_COUNT}]"
        )
    if classes.tolist() != list(CLASSES):
        raise LogitsFileError(
            f"{path}: classes are {_beginning(classes)}; needed the RNN's order, "
            f"{_beginning(np.array(CLASSES))}: reorder the columns of logits"
        )
    if frames.ndim != 1 or frames.dtype.kind not in "iu" or (frames < 0).any():
        raise LogitsFileError(
            f"{path}: frames are {frames.dtype} {frames.shape}; needed int32 [trials], none below 0"
        )
    if trial.shape != frames.shape or trial.dtype.kind not in "US":
        raise LogitsFileError(
            f"{path}: trial is {trial.dtype} {trial.shape}; "
            f"needed str {frames.shape}, as many as frames"
        )
    if int(frames.sum()) != len(logits):
        raise LogitsFileError(
            f"{path}: frames add up to {int(frames.sum())}, but logits have {len(logits)} rows; "
            "needed the same: make the file again"
        )
    try:
        names = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in trial)
    except UnicodeDecodeError as error:
        raise LogitsFileError(
            f"{path}: trial holds bytes that are not UTF-8 ({error}); needed str"
        ) from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise LogitsFileError(
            f"{path}: trial {twice[0]!r} is there {names.count(twice[0])} times "
            f"({len(twice)} names more than once); needed each name once"
        )
    ends = np.cumsum(frames, dtype=np.int64)
    return Logits(logits.astype(np.float32, copy=False), ends, names, checkpoint)


def _beginning(classes: np.ndarray) -> str:
    names = [repr(str(name)) for name in classes.reshape(-1)]
    return f"{len(names)} names, {', '.join(names[:3])} to {', '.join(names[-1:])}"
