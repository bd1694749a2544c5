"""Writes packed sessions (`packed.py`): each file whole or not at all, the manifest last."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.data.batches.buckets import BucketChoice, buckets_of_data
from b2txt_jax.data.description import DataError
from b2txt_jax.data.packed import (
    DTYPES,
    FORMAT,
    MANIFEST,
    PackedSplit,
    checksum_of,
    features_path,
    index_path,
    load_split,
)
from b2txt_jax.data.trial import Trial

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PackSettings:
    """What to pack, and the format.

    Attributes:
      dtype: of the packed features, 'float32', 'float16' or 'bfloat16'.
      sessions: to pack. Empty: all found.
      feature_count: features per bin.
      min_bins: bins of 20 ms that a trial must have.
      days_per_batch: of training batches, for the choice of buckets.
      trials_per_day: of training batches, for the choice of buckets.
      plan: of training batches, for the choice of buckets.
    """

    dtype: str = "float32"
    sessions: tuple[str, ...] = ()
    feature_count: int = 512
    min_bins: int = 1
    days_per_batch: int = 4
    trials_per_day: int = 16
    plan: str = "days"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DataError(f"--dtype is {self.dtype!r}; needed one of {', '.join(DTYPES)}")


def write_split(
    out: Path,
    session: str,
    split: str,
    trials: Iterable[Trial],
    settings: PackSettings,
    source: Mapping[str, Any],
    advance: Callable[[], None] = lambda: None,
) -> PackedSplit:
    """Pack one session's split. Its index is written last, whole or not at all.

    Args:
      out: folder to write to.
      session: its name.
      split: train, val or test.
      trials: in order, with features [T, D].
      settings: the dtype and feature count.
      source: description of their origin. A changed source is packed again.
      advance: called after each trial.

    Raises:
      DataError: the disk is full, or a value is too large for the dtype.
    """
    dtype = DTYPES[settings.dtype]
    path, index = features_path(out, session, split), index_path(out, session, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    # An index must not outlive the contents that it describes.
    index.unlink(missing_ok=True)
    entries: list[dict[str, Any]] = []
    offset = 0
    with whole_file(path) as file:
        for trial in trials:
            features = np.ascontiguousarray(_converted(trial, dtype))
            octets = features.view(np.uint8).data.cast("B")
            file.write(octets)
            entries.append(_entry(trial, offset, zlib.crc32(octets)))
            offset += len(octets)
            advance()
    values = {
        "format": FORMAT,
        "session": session,
        "split": split,
        "dtype": settings.dtype,
        "feature_count": settings.feature_count,
        "bytes": offset,
        "source": dict(source),
        "trials": entries,
    }
    with whole_file(index) as file:
        file.write(json.dumps(values).encode())
    return load_split(out, session, split, None)


def write_manifest(
    out: Path, packed: Mapping[tuple[str, str], PackedSplit], settings: PackSettings
) -> BucketChoice:
    """Choose buckets from the lengths of all trials and write the manifest.

    Raises:
      DataError: there is no trial, or the disk is full.
    """
    lengths = {
        place: [(t.ref.bins, t.ref.label_length) for t in split.trials.values()]
        for place, split in packed.items()
    }
    if not any(lengths.values()):
        raise DataError(f"found no trial to pack into {out}; needed at least one: check --root")
    choice = buckets_of_data(
        [found for (_, split), found in sorted(lengths.items()) if split == "train"],
        [n for (_, split), found in sorted(lengths.items()) if split != "train" for n in found],
        settings.days_per_batch,
        settings.trials_per_day,
        settings.plan,
    )
    sessions: dict[str, dict[str, Any]] = {}
    for (session, split), found in sorted(packed.items()):
        bins = [length for length, _ in lengths[session, split]]
        sessions.setdefault(session, {})[split] = {
            "trials": len(bins),
            "bins": sum(bins),
            "shortest": min(bins, default=0),
            "longest": max(bins, default=0),
            "bytes": found.size,
            "index_crc32": zlib.crc32(index_path(out, session, split).read_bytes()),
        }
    values = {
        "format": FORMAT,
        "dtype": settings.dtype,
        "feature_count": settings.feature_count,
        "days_per_batch": settings.days_per_batch,
        "trials_per_day": settings.trials_per_day,
        "plan": settings.plan,
        "buckets": [list(bucket) for bucket in choice.buckets],
        "training_padding": choice.training_padding,
        "evaluation_padding": choice.evaluation_padding,
        "sessions": sessions,
    }
    with whole_file(out / MANIFEST) as file:
        file.write(json.dumps({**values, "crc32": checksum_of(values)}, indent=1).encode())
    return choice


def _converted(trial: Trial, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        features = trial.features.astype(dtype, copy=False)
    if dtype.itemsize < 4 and not np.isfinite(features.astype(np.float32)).all():
        raise DataError(
            f"{trial.ref.path} {trial.ref.key} has values up to {np.abs(trial.features).max():g}, "
            f"too large for {dtype}: pack with --dtype float32"
        )
    return features


def _entry(trial: Trial, offset: int, crc32: int) -> dict[str, Any]:
    return {
        "key": trial.ref.key,
        "bins": len(trial.features),
        "offset": offset,
        "crc32": crc32,
        "block": trial.ref.block,
        "trial": trial.ref.trial,
        "sentence": trial.sentence,
        "labels": None if trial.labels is None else trial.labels.tolist(),
    }


@contextmanager
def whole_file(path: Path) -> Iterator[Any]:
    """Open a file that is renamed to `path` once it is complete and on the disk.

    A killed process leaves `*.partial`, which the next call overwrites.

    Raises:
      DataError: the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            free = shutil.disk_usage(path.parent).free
            raise DataError(
                f"{path} cannot be written: {error.strerror}, {free / 1e9:.2f} GB free. What is "
                "finished was kept: free space and call `b2txt prepare` again, and it goes on; "
                "--dtype bfloat16 into another folder needs half of the space"
            ) from error
        raise
