"""Trials to batches of static shape, read ahead in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from b2txt_jax.config import DataConfig
from b2txt_jax.data.buckets import buckets_of_data
from b2txt_jax.data.description import DataError
from b2txt_jax.data.plan import plan
from b2txt_jax.data.sessions import (
    SplitReader,
    features_dtype,
    find_sessions,
    index_split,
    split_lengths,
)
from b2txt_jax.data.trial import SPLITS, Trial, TrialRef, frames_needed

_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
"""Batches in memory: at most six, one in each thread's hands and four waiting."""
_DISK_AHEAD = 2
"""Steps ahead of a batch that the kernel is asked to fetch from the disk, into its page cache."""


class Batch(NamedTuple):
    """Trials padded with zeros to one bucket's shape.

    The loader fills it with numpy arrays, which a jitted step takes as they are.
    """

    features: jax.Array
    """[B, T, D], one row per 20 ms bin; float32, or as packed (float16, bfloat16): steps cast."""
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


def resolve_buckets(data: DataConfig, sessions: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The configured buckets; where there are none, those chosen from the lengths of all splits.

    The choice is that of `b2txt prepare`, and the same on every host.

    Args:
      data: `buckets` may be empty.
      sessions: in day-index order.

    Raises:
      DataError: the folder is missing or empty, or a trial cannot be used.
    """
    if data.buckets:
        return data.buckets
    lengths = {
        split: split_lengths(data.root, sessions, split, data.feature_count) for split in SPLITS
    }
    held_out = [length for split in ("val", "test") for day in lengths[split] for length in day]
    if not held_out and not any(lengths["train"]):
        raise DataError(
            f"{data.root} has no trial in the {len(sessions)} sessions asked for; needed some to "
            "choose length buckets from: check data.root and data.sessions, or set data.buckets"
        )
    choice = buckets_of_data(lengths["train"], held_out, data.days_per_batch, data.trials_per_day)
    return choice.buckets


class _Loader:
    """Fills batches: what training and evaluation share."""

    def __init__(self, data: DataConfig, sessions: Sequence[str], labels_needed: bool) -> None:
        self.features_dtype = features_dtype(data.root)
        """Of the batches' features: float32, or as packed."""
        self.buckets = resolve_buckets(data, sessions)
        """(bins, labels) shapes that batches have."""
        self._feature_count = data.feature_count
        self._reader = SplitReader(feature_count=data.feature_count, labels_needed=labels_needed)

    def will_need(self, rows: Sequence[tuple[int, TrialRef]]) -> None:
        """Starts to fetch the trials of (day, trial) rows from the disk, in the background."""
        self._reader.will_need([ref for _, ref in rows])

    def fill(
        self, rows: Sequence[tuple[int, TrialRef]], bucket: tuple[int, int], size: int
    ) -> tuple[list[Trial], Batch]:
        """Reads (day, trial) rows into a batch of `size` rows; missing rows are zeros.

        Each trial is read straight into its row. The trials' features are views of the batch.
        """
        bins, label_count = bucket
        # Zeros come from the kernel: only the pages that hold trials are written.
        features = np.zeros((size, bins, self._feature_count), self.features_dtype)
        labels = np.zeros((size, label_count), np.int32)
        counts = np.zeros((3, size), np.int32)
        self.will_need(rows)
        trials = []
        for row, (day, ref) in enumerate(rows):
            trial = self._reader.read_into(ref, features[row])
            label = trial.labels if trial.labels is not None else np.zeros(0, np.int32)
            if len(label) > label_count:
                raise DataError(
                    f"trial {ref.name} has {len(label)} labels, {ref.label_length} when it was "
                    "listed: the file changed; start again"
                )
            labels[row, : len(label)] = label
            counts[:, row] = len(trial.features), day, len(label)
            trials.append(trial)
        arrays: Any = (features, counts[0], counts[1], labels, counts[2])
        return trials, Batch(*arrays)


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
        self._loader = _Loader(data, sessions, labels_needed=True)
        for ref in refs:
            bucket_of([ref], self._loader.buckets)
            self._check_alignable(ref, ref.label_length)
        self.refs_of_day = [[ref for ref in refs if ref.session == name] for name in sessions]

    @property
    def features_dtype(self) -> np.dtype:
        """Of the batches' features: float32, or float16 or bfloat16 of a folder packed so."""
        return self._loader.features_dtype

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

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        """Reads one batch, or some of its rows.

        Args:
          seed: of the run.
          step: of the optimizer, from 0.
          rows: of the global batch, those of this host; None: all. Whatever they are, the batch is
            padded to the bucket of the global batch, so that all hosts have the same shape.

        Raises:
          DataError: a trial cannot be read; the text names it.
        """
        drawn = self.rows(seed, step)
        bucket = bucket_of([ref for _, ref in drawn], self._loader.buckets)
        mine = drawn if rows is None else drawn[rows]
        trials, batch = self._loader.fill(mine, bucket, len(mine))
        for trial in trials:
            if trial.labels is not None:
                self._check_alignable(trial.ref, frames_needed(trial.labels))
        return batch

    def batches(
        self, seed: int, start: int, stop: int, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Batches of steps start .. stop - 1, read ahead by background threads; `rows` as above."""

        def load(step: int) -> Batch:
            if step + _DISK_AHEAD < stop:
                self._loader.will_need(self.rows(seed, step + _DISK_AHEAD)[rows or slice(None)])
            return self.batch(seed, step, rows)

        steps = grain.MapDataset.range(start, stop)
        return iter(steps.map(lambda step: load(int(step))).to_iter_dataset(_READ_AHEAD))


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
        self.sessions = tuple(sessions)
        """In day-index order."""
        self._day = {name: day for day, name in enumerate(sessions)}
        self.refs = index_split(
            data.root,
            sessions,
            split,
            data.feature_count,
            min_bins=min_bins,
            labels_needed=labels,
        )
        self._loader = _Loader(data, sessions, labels_needed=labels)
        self._groups = self._grouped()

    def _grouped(self) -> list[list[int]]:
        by_bucket: dict[tuple[int, int], list[int]] = {}
        for index, ref in enumerate(self.refs):
            by_bucket.setdefault(bucket_of([ref], self._loader.buckets), []).append(index)
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

    @property
    def features_dtype(self) -> np.dtype:
        """Of the batches' features: float32, or float16 or bfloat16 of a folder packed so."""
        return self._loader.features_dtype

    def batches(self, rows: slice | None = None) -> Iterator[tuple[list[int], list[Trial], Batch]]:
        """(indices into `refs`, their trials, padded batch); rows past the indices are filling.

        Args:
          rows: of each global batch, those of this host; None: all. Indices and trials are those
            of these rows alone, and may be none; every host gives as many batches, of the same
            bucket.

        Raises:
          DataError: a trial cannot be read; the text names it.
        """
        wanted = range(self._data.eval_batch_size)[rows or slice(None)]

        def load(group: int) -> tuple[list[int], list[Trial], Batch]:
            everything = self._groups[group]
            bucket = bucket_of([self.refs[i] for i in everything], self._loader.buckets)
            indices = [everything[row] for row in wanted if row < len(everything)]
            refs = [self.refs[i] for i in indices]
            days = [self._day[ref.session] for ref in refs]
            pairs = list(zip(days, refs, strict=True))
            trials, batch = self._loader.fill(pairs, bucket, len(wanted))
            return indices, trials, batch

        groups = grain.MapDataset.range(len(self._groups))
        return iter(groups.map(load).to_iter_dataset(_READ_AHEAD))
