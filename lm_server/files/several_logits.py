"""Logits files of the same trials by several systems: checked, averaged, or one after the other."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_server.files.logits_file import Logits, LogitsFileError

MEANS = ("logarithms", "probabilities")


def of_same_trials(systems: Mapping[str, Logits]) -> dict[str, Logits]:
    """Return the logits of all files in the order of the first file's trials.

    Args:
      systems: the logits by the names of their files.

    Raises:
      LogitsFileError: a file has other trials than the first.
    """
    (first, base), *others = systems.items()
    found = {first: base}
    for name, one in others:
        for more, fewer, lacking in ((name, first, base), (first, name, one)):
            only = [trial for trial in systems[more].trials if trial not in {*lacking.trials}]
            if only:
                raise LogitsFileError(
                    f"{more} has {len(only)} trials that {fewer} lacks, the first is {only[0]}; "
                    "needed the same split of the same data: make both files anew"
                )
        places = {trial: index for index, trial in enumerate(one.trials)}
        found[name] = one.select([places[trial] for trial in base.trials])
    return found


def averaged(systems: Mapping[str, Logits]) -> Logits:
    """Return the mean of the normalised logits of files of the same trials, frame by frame.

    Raises:
      LogitsFileError: a trial has other frames in a file than in the first.
    """
    (first, base), *others = systems.items()
    for name, one in others:
        for index in np.flatnonzero(one.ends != base.ends)[:1]:
            raise LogitsFileError(
                f"trial {base.trials[index]} has {len(base.of(index))} frames in {first} and "
                f"{len(one.of(index))} in {name}; needed models with patches of the same size and "
                "stride, or --combine mbr, which compares sentences"
            )
    means = [average([one.of(n) for one in systems.values()]) for n in range(len(base.trials))]
    return dataclasses.replace(
        base,
        logits=np.concatenate(means or [base.logits]),
        checkpoint=_joint_checkpoint([one.checkpoint for one in systems.values()]),
    )


def in_turn(systems: Mapping[str, Logits]) -> Logits:
    """Return each trial of the first file, followed by the same trial of the others.

    The trials of several files are named by their file too.
    """
    if len(systems) == 1:
        return next(iter(systems.values()))
    parts, names = [], []
    for index, trial in enumerate(next(iter(systems.values())).trials):
        parts += [one.of(index) for one in systems.values()]
        names += [f"{trial} of {name}" for name in systems]
    ends = np.cumsum([len(one) for one in parts], dtype=np.int64)
    empty = [next(iter(systems.values())).logits[:0]]
    return Logits(np.concatenate(parts or empty), ends, tuple(names))


def average(logits: Sequence[np.ndarray], mean: str = MEANS[0]) -> np.ndarray:
    """Return the mean of several [frames, 41], as normalised log-probabilities float32."""
    every = np.stack(logits).astype(np.float64)
    every -= np.logaddexp.reduce(every, axis=-1, keepdims=True)
    if mean == "probabilities":
        averaged = np.logaddexp.reduce(every, axis=0) - np.log(len(every))
    else:
        averaged = every.mean(0)
        averaged -= np.logaddexp.reduce(averaged, axis=-1, keepdims=True)
    return averaged.astype(np.float32)


def joint_fingerprint(parameters: Sequence[str]) -> str:
    """Return eight hexadecimal digits that are the same for equal parameters of all systems."""
    return f"{zlib.crc32(' '.join(parameters).encode()):08x}"


def _joint_checkpoint(systems: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fingerprint of `b2txt ensemble` for the same systems. Empty: one is not known."""
    if not all("parameters" in one for one in systems):
        return {}
    parameters = joint_fingerprint([str(one["parameters"]) for one in systems])
    steps = [one["step"] for one in systems if isinstance(one.get("step"), int)]
    return {**systems[0], **({"step": max(steps)} if steps else {}), "parameters": parameters}
