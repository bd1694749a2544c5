"""Trials to batches of static shape, read ahead in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from b2txt_jax.config import DataConfig
from b2txt_jax.data.hdf5 import (
    DataError,
    SplitReader,
    Trial,
    TrialRef,
    find_sessions,
    frames_needed,
    index_split,
)
from b2txt_jax.data.plan import plan

_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class Batch(NamedTuple):
    """Trials padded with zeros to one bucket's shape.

    The loader fills it with numpy arrays, which a jitted step takes as they are.
    """

    features: jax.Array
    """float32 [B, T, D], one row per 20 ms bin."""
    bins: jax.Array
    """int32 [B], valid bins; 0 marks a row that only fills the batch."""
    day: jax.Array
    """int32 [B], index of the session in the configured list."""
    labels: jax.Array
    """int32 [B, L], class ids padded with 0."""
    label_length: jax.Array
    """int32 [B]."""


def configured_sessions(data: DataConfig) -> tuple[str, ...]:
    """The sessions in day-index order: the configured ones, or all in the folder.

    Raises:
      DataError: the folder is missing or empty.
    """
    return data.sessions or find_sessions(data.root)


def bucket_of(refs: Sequence[TrialRef], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first (bins, labels) bucket that holds all of `refs`.

    Raises:
      DataError: a trial fits no bucket.
    """
    bins = max(ref.bins for ref in refs)
    labels = max(ref.label_length for ref in refs)
    for bucket in buckets:
        if bins <= bucket[0] and labels <= bucket[1]:
            return bucket
    too_long = next(
        ref for ref in refs if ref.bins > buckets[-1][0] or ref.label_length > buckets[-1][1]
    )
    raise DataError(
        f"trial {too_long.name} has {too_long.bins} bins and {too_long.label_length} labels; the "
        f"largest bucket holds {buckets[-1]}: add a larger one to data.buckets or drop the trial"
    )


def assemble(
    trials: Sequence[Trial], days: Sequence[int], bucket: tuple[int, int], rows: int
) -> Batch:
    """Pads trials to a bucket and the batch to `rows`; missing rows and labels are zeros."""
    bins, label_count = bucket
    features = np.zeros((rows, bins, trials[0].features.shape[1]), np.float32)
    labels = np.zeros((rows, label_count), np.int32)
    counts = np.zeros((3, rows), np.int32)
    for row, (trial, day) in enumerate(zip(trials, days, strict=True)):
        label = trial.labels if trial.labels is not None else np.zeros(0, np.int32)
        features[row, : len(trial.features)] = trial.features
        labels[row, : len(label)] = label
        counts[:, row] = len(trial.features), day, len(label)
    arrays: Any = (features, counts[0], counts[1], labels, counts[2])
    return Batch(*arrays)


class TrainingData:
    """The training trials of the configured sessions and the batches drawn from them."""

    def __init__(
        self,
        data: DataConfig,
        sessions: Sequence[str],
        min_bins: int,
        frames_of_bins: Callable[[int], int],
    ):
        """Lists the trials.

        Args:
          data: where they are and how batches are drawn.
          sessions: in day-index order.
          min_bins: bins that a trial must have, those of one patch.
          frames_of_bins: how many frames the model makes of so many bins.

        Raises:
          DataError: a file or trial cannot be used, or one fits no bucket.
        """
        self._data = data
        self._frames_of_bins = frames_of_bins
        refs = index_split(data.root, sessions, "train", data.feature_count, min_bins=min_bins)
        for ref in refs:
            bucket_of([ref], data.buckets)
            self._check_alignable(ref, ref.label_length)
        self.refs_of_day = [[ref for ref in refs if ref.session == name] for name in sessions]
        self._reader = SplitReader(feature_count=data.feature_count, labels_needed=True)

    def _check_alignable(self, ref: TrialRef, needed: int) -> None:
        frames = self._frames_of_bins(ref.bins)
        if needed > frames:
            raise DataError(
                f"trial {ref.name} has a label of {ref.label_length} phonemes, which needs "
                f"{needed} "
                f"frames, but its {ref.bins} bins give {frames} frames: drop the trial, correct "
                f"its "
                "label, or lower model.patch_stride"
            )

    def rows(self, seed: int, step: int) -> list[tuple[int, TrialRef]]:
        """The (day, trial) rows of one batch, a function of (seed, step) alone."""
        counts = [len(refs) for refs in self.refs_of_day]
        drawn = plan(seed, step, counts, self._data.days_per_batch, self._data.trials_per_day)
        return [(int(day), self.refs_of_day[day][trial]) for day, trial in drawn]

    def batch(self, seed: int, step: int) -> Batch:
        """Reads one batch.

        Raises:
          DataError: a trial cannot be read; the text names it.
        """
        rows = self.rows(seed, step)
        trials = [self._reader.read(ref) for _, ref in rows]
        for trial in trials:
            if trial.labels is not None:
                self._check_alignable(trial.ref, frames_needed(trial.labels))
        bucket = bucket_of([ref for _, ref in rows], self._data.buckets)
        return assemble(trials, [day for day, _ in rows], bucket, len(rows))

    def batches(self, seed: int, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps start .. stop - 1, read ahead by background threads."""
        steps = grain.MapDataset.range(start, stop)
        return iter(
            steps.map(lambda step: self.batch(seed, int(step))).to_iter_dataset(_READ_AHEAD)
        )


class EvaluationData:
    """Every trial of a split, once, in batches of one shape per bucket."""

    def __init__(
        self, data: DataConfig, sessions: Sequence[str], split: str, min_bins: int, labels: bool
    ):
        """Lists the trials.

        Raises:
          DataError: a file or trial cannot be used, or one fits no bucket.
        """
        self._data = data
        self._day = {name: day for day, name in enumerate(sessions)}
        self.refs = index_split(
            data.root,
            sessions,
            split,
            data.feature_count,
            min_bins=min_bins,
            labels_needed=labels,
        )
        self._reader = SplitReader(feature_count=data.feature_count, labels_needed=labels)
        self._groups = self._grouped()

    def _grouped(self) -> list[list[int]]:
        by_bucket: dict[tuple[int, int], list[int]] = {}
        for index, ref in enumerate(self.refs):
            by_bucket.setdefault(bucket_of([ref], self._data.buckets), []).append(index)
        size = self._data.eval_batch_size
        return [
            indices[start : start + size]
            for _, indices in sorted(by_bucket.items())
            for start in range(0, len(indices), size)
        ]

    @property
    def batch_count(self) -> int:
        """Batches that `batches` gives."""
        return len(self._groups)

    def batches(self) -> Iterator[tuple[list[int], list[Trial], Batch]]:
        """(indices into `refs`, their trials, padded batch); rows past the indices are filling."""

        def load(group: int) -> tuple[list[int], list[Trial], Batch]:
            indices = self._groups[group]
            trials = [self._reader.read(self.refs[i]) for i in indices]
            days = [self._day[trial.ref.session] for trial in trials]
            bucket = bucket_of([trial.ref for trial in trials], self._data.buckets)
            return indices, trials, assemble(trials, days, bucket, self._data.eval_batch_size)

        groups = grain.MapDataset.range(len(self._groups))
        return iter(groups.map(load).to_iter_dataset(_READ_AHEAD))
