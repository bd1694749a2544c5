"""What a file of Neurodata Without Borders (NWB 2) holds, read as the HDF5 that it is.

A time series is a group with `data` [samples, channels] and either `timestamps` [samples] in
seconds or `starting_time` with the attribute `rate`. It is below `acquisition`, or below a module
of `processing`. The trials are a table of columns in `intervals/trials`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from b2txt_jax.data.description import DataError
from b2txt_jax.data.foreign.recording import matrix
from b2txt_jax.data.hdf5 import check_own

BIN_SECONDS = 0.02
_TRIALS = "intervals/trials"
_SECONDS = ("s", "seconds")
_TOLERANCE = 1e-6
"""Seconds by which a time may miss the edge of a trial, as clocks are stored in floating point."""


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open an NWB file.

    Raises:
      DataError: it is another file, is damaged, or is read beyond what it holds.
    """
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            if "nwb_version" not in file.attrs:
                raise DataError(
                    f"{path} is HDF5 and no NWB file, which has an attribute `nwb_version`; needed "
                    "a file of NWB 2"
                )
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as NWB ({error}); needed a whole file: copy or download it "
            "again"
        ) from error


@dataclass(frozen=True)
class Series:
    """A time series, its values read in part."""

    name: str
    where: str
    data: h5py.Dataset
    times: np.ndarray
    """float64 [samples], seconds."""

    @property
    def width(self) -> float:
        """Seconds from sample to sample, the median.

        Raises:
          DataError: times fall, or several samples share each time.
        """
        steps = np.diff(self.times)
        if not len(steps) or not np.isfinite(steps).all() or steps.min() < 0:
            raise DataError(
                f"{self.where}: the {len(self.times)} times do not rise; needed finite times in "
                "seconds, in their order"
            )
        width = float(np.median(steps))
        if width <= 0:
            raise DataError(
                f"{self.where}: several samples share a time, as where a stream sends more than "
                "one sample at once; needed a time for each bin: export a stream of one bin an "
                "entry"
            )
        return width

    def bins(self, start: float, stop: float, where: str) -> np.ndarray:
        """Return the samples from `start` up to `stop` seconds as bins of 20 ms, float32 [T, D].

        Shorter samples are averaged. An incomplete last bin is left out.

        Raises:
          DataError: there is none, some are missing, or 20 ms are no multiple of them.
        """
        width = self.width
        merged = round(BIN_SECONDS / width)
        if merged < 1 or abs(merged * width - BIN_SECONDS) > 0.05 * BIN_SECONDS:
            raise DataError(
                f"{self.where} has a sample every {1000 * width:.4g} ms; needed every 20 ms, or a "
                "whole part of it: bin the stream so, or export it again with the right rate of "
                "its clock (BRAND's sync_timing_hz)"
            )
        first, last = np.searchsorted(self.times, np.array([start, stop]) - _TOLERANCE)
        held = self.times[first:last]
        # A trial may begin and end between two bins.
        if len(held) and max(held[0] - start, stop - held[-1] - width) > 1.5 * BIN_SECONDS:
            raise DataError(
                f"{where} lasts from {start:.3f} to {stop:.3f} s, and {self.name} has samples from "
                f"{held[0]:.3f} to {held[-1]:.3f} s of it; needed all: remove it from the table of "
                "trials"
            )
        gaps = np.flatnonzero(np.diff(held) > 1.5 * width)
        if gaps.size:
            raise DataError(
                f"{where}: samples of {self.name} are missing {len(gaps)} times, the first after "
                f"{held[gaps[0]]:.3f} s; needed all of a trial: remove it from the table of trials"
            )
        whole = (last - first) // merged * merged
        values = np.asarray(self.data[first : first + whole])
        found = matrix(
            values.reshape(len(values), math.prod(values.shape[1:])), f"{where} in {self.name}"
        )
        return found.reshape(-1, merged, found.shape[1]).mean(axis=1)


def series_of(file: h5py.File, path: Path, names: tuple[str, ...]) -> list[Series]:
    """Return the time series of these names, or the only one where none is named.

    Raises:
      DataError: there is no such series, or it lacks its data or times.
    """
    groups = {
        one.name.rpartition("/")[2]: one
        for parent in (file.get("acquisition"), *_children(file.get("processing")))
        for one in _children(parent)
        if "data" in one
    }
    # What is no table of numbers, such as pictures, holds no features, and neither do times, such
    # as those of each entry of a stream, which BRAND's export adds.
    numeric = [
        name
        for name, one in groups.items()
        if one["data"].ndim == 2 and _is_number(one["data"]) and not _is_time(one["data"])
    ]
    listed = ", ".join(sorted(groups)) or "none"
    if not names and len(numeric) != 1:
        raise DataError(
            f"{path} has {len(numeric)} time series of several channels ({listed}); needed the "
            "names of those with features, in the order that they are to have: give --series NAME "
            "for each"
        )
    found = []
    for name in names or numeric:
        if names.count(name) > 1:
            raise DataError(f"--series {name} is there {names.count(name)} times; needed once")
        if name not in groups:
            raise DataError(f"{path} has no time series {name}, only {listed}: correct --series")
        where = f"{path}: {name}"
        check_own(groups[name]["data"], path, where)
        if not _is_number(groups[name]["data"]):
            raise DataError(f"{where} holds {groups[name]['data'].dtype}; needed numbers")
        found.append(Series(name, where, groups[name]["data"], _times(groups[name], path, where)))
    return found


def _children(parent: h5py.Group | None) -> list[h5py.Group]:
    found = parent.values() if isinstance(parent, h5py.Group) else ()
    return [one for one in found if isinstance(one, h5py.Group)]


def _is_number(data: h5py.Dataset) -> bool:
    return data.dtype.kind in "iufb"


def _is_time(data: h5py.Dataset) -> bool:
    unit = data.attrs.get("unit", "")
    return (unit.decode(errors="replace") if isinstance(unit, bytes) else unit) in _SECONDS


def _times(group: h5py.Group, path: Path, where: str) -> np.ndarray:
    count = len(group["data"])
    if "timestamps" in group:
        check_own(group["timestamps"], path, f"{where} timestamps")
        times = np.asarray(group["timestamps"], np.float64)
        if times.shape != (count,):
            raise DataError(
                f"{where} has {count} samples and {list(times.shape)} timestamps; needed one each"
            )
        return times
    start = group.get("starting_time")
    rate = float(start.attrs.get("rate", 0)) if start is not None else 0.0
    if not rate > 0:
        raise DataError(
            f"{where} has neither timestamps nor a starting time with a rate; needed one of them "
            "to find trials: export it again"
        )
    return float(start[()]) + np.arange(count) / rate


class Trials:
    """The table of trials, column by column."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        """Raise DataError where there is no table, or no trial in it."""
        table = file.get(_TRIALS)
        if not isinstance(table, h5py.Group) or "start_time" not in table:
            raise DataError(
                f"{path} has no table of trials; needed {_TRIALS} with start_time, stop_time and a "
                "column of texts: export the stream that has the trials too"
            )
        self._table, self._path = table, path
        self.where = f"{path}: the trials'"
        self.start, self.stop = self.times("start_time"), self.times("stop_time")
        if not len(self.start):
            raise DataError(f"{path} has a table of trials without a trial; needed at least one")
        wrong = np.flatnonzero(~(self.stop > self.start))
        if wrong.size:
            at = wrong[0]
            raise DataError(
                f"{path}: trial {at} lasts from {self.start[at]} to {self.stop[at]} s; needed its "
                "end after its start"
            )

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return sorted(self._table)

    def times(self, name: str) -> np.ndarray:
        """Return a column of times in seconds, float64 [N]."""
        values = self._column(name)
        if values.dtype.kind not in "iuf":
            raise DataError(f"{self.where} {name} is {values.dtype}; needed seconds")
        return values.astype(np.float64)

    def texts(self, name: str) -> list[str | None]:
        """Return a column of texts. None: a trial has none, empty or not a number in its place."""
        values = self._column(name)
        if values.dtype.kind not in "OSU":
            if values.dtype.kind == "f" and np.isnan(values).all():
                return [None] * len(values)
            raise DataError(
                f"{self.where} {name} is {values.dtype}; needed texts: name the column of "
                f"sentences with --text ({', '.join(self.columns)})"
            )
        found: list[str | None] = []
        for index, value in enumerate(values):
            try:
                text = value.decode() if isinstance(value, bytes) else value
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.where} {name} is {value!r} in trial {index} ({error}); needed UTF-8"
                ) from error
            if not isinstance(text, str):
                raise DataError(f"{self.where} {name} holds {type(text).__name__}; needed texts")
            found.append(text.strip() if text.strip(" \0") not in ("", "nan") else None)
        return found

    def whole_numbers(self, name: str) -> list[int]:
        """Return a column of whole numbers."""
        values = self._column(name)
        if values.dtype.kind not in "iuf":
            raise DataError(f"{self.where} {name} is {values.dtype}; needed whole numbers")
        wrong = np.flatnonzero(np.mod(values, 1) != 0)
        if wrong.size:
            raise DataError(
                f"{self.where} {name} is {values[wrong[0]]} in trial {wrong[0]}; needed whole "
                "numbers"
            )
        return [int(value) for value in values]

    def _column(self, name: str) -> np.ndarray:
        found = self._table.get(name)
        if not isinstance(found, h5py.Dataset):
            raise DataError(
                f"{self.where} columns are {', '.join(self.columns)}; needed `{name}` among them"
            )
        check_own(found, self._path, f"{self.where} {name}")
        values = np.asarray(found)
        wanted = self._table["start_time"].shape
        if values.shape != wanted:
            raise DataError(
                f"{self.where} {name} is {list(values.shape)}, and start_time {list(wanted)}; "
                "needed one value for each trial"
            )
        return values
