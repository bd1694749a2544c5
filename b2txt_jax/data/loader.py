"""Trials to batches of static shape, read ahead in the background."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from b2txt_jax.config import DataConfig, SignalConfig
from b2txt_jax.data.batches.buckets import buckets_of_data, mean_bins, training_padding
from b2txt_jax.data.batches.layout import Rules, Shape
from b2txt_jax.data.batches.shapes import Shapes, choose, drawn_trials
from b2txt_jax.data.description import DataError
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import SPLITS, Reader, Trial, TrialRef, frames_needed

MUCH_PADDING = 0.6
"""Share of padding in a batch beyond which the user is warned. Buckets chosen from the data have
about 0.3 to 0.45, since the longest of all rows decides."""
_BYTES_AHEAD = 1 << 30
"""Of the batches that are read ahead or are being read, at most, but two batches at least."""
_MOST_THREADS = 16


def reading_threads() -> int:
    """Return how many threads read batches: half of the cores that the process may use.

    Two at least, since one of them may be waiting for the disk.
    """
    here = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1
    return max(2, min(_MOST_THREADS, cores // 2))


def batches_ahead(batch_bytes: int) -> int:
    """Return how many batches of a size are in memory at most, besides the one in use."""
    return max(2, min(reading_threads() + 2, _BYTES_AHEAD // max(1, batch_bytes)))


_DISK_AHEAD = 2
"""Steps ahead of a batch that the kernel is asked to fetch from the disk, into its page cache."""

_Item = TypeVar("_Item")
_Loaded = TypeVar("_Loaded")


class Batch(NamedTuple):
    """Trials padded with zeros to one bucket's shape. The loader fills it with numpy arrays.

    Packed, B rows hold several trials each, at most S. Their labels come in G groups of at most N
    trials, one group for each device that shares the rows.
    """

    features: jax.Array
    """[B, T, D], one row per 20 ms bin: float32, or float16 or bfloat16, which steps cast."""
    bins: jax.Array
    """int32 [B], valid bins. 0 marks a row without a trial. Packed [B, S]."""
    day: jax.Array
    """int32 [B], index of the session in the configured list."""
    labels: jax.Array
    """int32 [B, L], class ids padded with 0. Packed [G, N, L]."""
    label_length: jax.Array
    """int32 [B]. Packed [G, N]."""
    start: Any = None
    """Packed int32 [B, S], first bin of each trial, the row's length for none. Else None."""
    trial: Any = None
    """Packed int32 [B, S], number of the trial in the plan's batch. Else None."""
    slot: Any = None
    """Packed int32 [G, N], the trial's place in its group's part of `bins`, flat. -1 for none. Else
    None."""


def configured_sessions(data: DataConfig) -> tuple[str, ...]:
    """Return the sessions in day-index order: the configured ones, or all in the folder.

    Raises:
      DataError: the folder is missing or empty.
    """
    return data.sessions or open_folder(data.root, data.feature_count).sessions


def read_ahead(
    load: Callable[[_Item], _Loaded], items: Iterable[_Item], ahead: int
) -> Iterator[_Loaded]:
    """Yield `load(item)` for each item, in order, computed by threads up to `ahead` items early.

    An exception of `load` is raised where its result would have been yielded. When the iterator is
    closed early, no further item is loaded, and the threads have ended when `close` returns.
    """
    waiting: deque[Future[_Loaded]] = deque()
    pool = ThreadPoolExecutor(min(ahead, reading_threads()), thread_name_prefix="read-ahead")
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def bucket_of(refs: Sequence[TrialRef], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the first (bins, labels) bucket that holds all of `refs`.

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


def resolve_buckets(
    data: DataConfig, sessions: Sequence[str], reader: Reader | None = None
) -> tuple[tuple[int, int], ...]:
    """Return the configured buckets, or else those chosen from the lengths of all splits.

    The choice is that of `b2txt prepare`, and the same on every host.

    Args:
      data: `buckets` may be empty.
      sessions: in day-index order.
      reader: of `data.root`, where it is open already.

    Raises:
      DataError: the folder is missing or empty, or a trial cannot be used.
    """
    if data.buckets:
        return data.buckets
    reader = reader or open_folder(data.root, data.feature_count)
    lengths = {split: reader.lengths(sessions, split) for split in SPLITS}
    held_out = [length for split in ("val", "test") for day in lengths[split] for length in day]
    if not held_out and not any(lengths["train"]):
        raise DataError(
            f"{data.root} has no trial in the {len(sessions)} sessions asked for; needed some to "
            "choose length buckets from: check data.root and data.sessions, or set data.buckets"
        )
    choice = buckets_of_data(
        lengths["train"], held_out, data.days_per_batch, data.trials_per_day, data.plan
    )
    return choice.buckets


class _Loader:
    """Fills batches, for training and for evaluation."""

    def __init__(
        self, data: DataConfig, sessions: Sequence[str], signal: SignalConfig | None
    ) -> None:
        self.reader = open_folder(data.root, data.feature_count, signal)
        self.buckets = resolve_buckets(data, sessions, self.reader)
        """(bins, labels) shapes that batches have."""

    @property
    def features_dtype(self) -> np.dtype:
        """Of the batches' features: float32, or float16 or bfloat16 of a folder packed so."""
        return self.reader.dtype

    def _ahead(self, bins: int) -> int:
        """Return how many batches of so many bins in all rows are read ahead."""
        return batches_ahead(bins * self.reader.feature_count * self.reader.dtype.itemsize)

    def fill(
        self, rows: Sequence[tuple[int, TrialRef]], bucket: tuple[int, int], size: int
    ) -> tuple[list[Trial], Batch]:
        """Read (day, trial) rows into a batch of `size` rows. Missing rows are zeros.

        Each trial is read straight into its row. The trials' features are views of the batch.
        """
        bins, label_count = bucket
        # Zeros come from the kernel: only the pages that hold trials are written.
        features = np.zeros((size, bins, self.reader.feature_count), self.reader.dtype)
        labels = np.zeros((size, label_count), np.int32)
        counts = np.zeros((3, size), np.int32)
        self.reader.will_need([ref for _, ref in rows])
        trials = []
        for row, (day, ref) in enumerate(rows):
            trial = self.reader.read_into(ref, features[row])
            label = self._label(trial, ref, label_count)
            labels[row, : len(label)] = label
            counts[:, row] = len(trial.features), day, len(label)
            trials.append(trial)
        arrays: Any = (features, counts[0], counts[1], labels, counts[2])
        return trials, Batch(*arrays)

    @staticmethod
    def _label(trial: Trial, ref: TrialRef, most: int) -> np.ndarray:
        """Return a trial's labels, none without."""
        label = trial.labels if trial.labels is not None else np.zeros(0, np.int32)
        if len(label) > most:
            raise DataError(
                f"trial {ref.name} has {len(label)} labels, {ref.label_length} when it was "
                "listed: the file changed; start again"
            )
        return label


class TrainingData(_Loader):
    """The training trials of the configured sessions and the batches drawn from them."""

    def __init__(
        self,
        data: DataConfig,
        sessions: Sequence[str],
        min_bins: int,
        frames_of_bins: Callable[[int], int],
        rules: Rules | None = None,
        sample: tuple[int, int] | None = None,
        signal: SignalConfig | None = None,
        split: str = "train",
        labels_needed: bool = True,
    ):
        """List the trials, and choose the shapes of their batches.

        Args:
          data: where they are and how batches are drawn.
          sessions: in day-index order.
          min_bins: fewest bins that give a frame. A trial must have them.
          frames_of_bins: how many frames the model makes of so many bins.
          rules: by which trials may share a row. None: they may not.
          sample: the run's seed and steps, whose batches decide the shapes. None: all buckets, and
            no trial shares a row.
          signal: how features are normalised as they are read. None: not at all.
          split: whose trials.
          labels_needed: whether a trial without labels is an error.

        Raises:
          DataError: a file or trial cannot be used, or one fits no bucket.
          PlanError: the sessions cannot fill a batch.
        """
        super().__init__(data, sessions, signal)
        self._data = data
        self._frames_of_bins = frames_of_bins
        refs = self.reader.trials(sessions, split, min_bins=min_bins, labels_needed=labels_needed)
        for ref in refs:
            bucket_of([ref], self.buckets)
            self._check_alignable(ref, ref.label_length)
        self.refs_of_day = [[ref for ref in refs if ref.session == name] for name in sessions]
        self.rows(0, 0)  # Data that cannot fill a batch are an error here.
        lengths = [[(ref.bins, ref.label_length) for ref in day] for day in self.refs_of_day]
        self.shapes = Shapes({Shape(data.batch_rows, *one): 0.0 for one in self.buckets}, None)
        if sample is not None:
            self.shapes = choose(data, self.buckets, lengths, rules, *sample)
        """Shapes that batches have. A batch that fits none of them has one of its own."""

    @property
    def packed(self) -> bool:
        """Whether trials share rows."""
        return self.shapes.rules is not None

    @property
    def padding(self) -> float:
        """Expected share of padding among the bins of a batch, 0 to 1."""
        data, bins = self._data, [[ref.bins for ref in refs] for refs in self.refs_of_day]
        rows = data.days_per_batch, data.trials_per_day
        if not self.packed:
            return training_padding(self.buckets, bins, *rows, data.plan)
        return 1 - data.batch_rows * mean_bins(bins, data.plan) / self.shapes.computed

    def _check_alignable(self, ref: TrialRef, needed: int) -> None:
        frames = self._frames_of_bins(ref.bins)
        if needed > frames:
            raise DataError(
                f"trial {ref.name} has a label of {ref.label_length} phonemes, which needs "
                f"{needed} frames, but its {ref.bins} bins give {frames} frames: drop the trial, "
                "correct its label, or change the model's settings (of a GRU model.patch_stride)"
            )

    def rows(self, seed: int, step: int) -> list[tuple[int, TrialRef]]:
        """Return the (day, trial) rows of one batch, a function of (seed, step) alone."""
        counts = [len(refs) for refs in self.refs_of_day]
        drawn = drawn_trials(self._data, counts, seed, step)
        return [(int(day), self.refs_of_day[day][trial]) for day, trial in drawn]

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        """Read one batch, or some of its rows.

        Args:
          seed: of the run.
          step: of the optimizer, from 0.
          rows: of the global batch, those of this host. None: all. The batch always has the shape
            of the global batch, so that all hosts have the same. Packed, other rows stand for the
            same share of it.

        Raises:
          DataError: a trial cannot be read. The text names it.
        """
        drawn = self.rows(seed, step)
        if not self.packed:
            used = [shape.bucket for shape in self.shapes.share]
            larger = [one for one in self.buckets if one > used[-1]]
            bucket = bucket_of([ref for _, ref in drawn], used + larger)
            mine = drawn if rows is None else drawn[rows]
            trials, batch = self.fill(mine, bucket, len(mine))
        else:
            trials, batch = self._fill_shared(drawn, rows)
        for trial in trials:
            if trial.labels is not None:
                self._check_alignable(trial.ref, frames_needed(trial.labels))
        return batch

    def _fill_shared(
        self, drawn: list[tuple[int, TrialRef]], rows: slice | None
    ) -> tuple[list[Trial], Batch]:
        """Read trials into the rows that they share."""
        layout = self.shapes.lay_out([ref.bins for _, ref in drawn], [day for day, _ in drawn])
        shape, groups = layout.shape, len(layout.slot)
        first, stop, _ = (rows or slice(None)).indices(len(drawn))
        mine = slice(first * groups // len(drawn), stop * groups // len(drawn))
        per_group = shape.rows // groups
        trial, start = (
            one[mine.start * per_group : mine.stop * per_group]
            for one in (layout.trial, layout.start)
        )
        slot = layout.slot[mine]
        features = np.zeros((len(trial), shape.bins, self.reader.feature_count), self.reader.dtype)
        bins, day = np.zeros_like(start), np.zeros(len(trial), np.int32)
        labels = np.zeros((*slot.shape, shape.labels), np.int32)
        length = np.zeros(slot.shape, np.int32)
        self.reader.will_need([drawn[index][1] for index in trial[trial >= 0]])
        read = []
        for group, place in np.argwhere(slot >= 0):
            row, segment = divmod(int(slot[group, place]), shape.segments)
            row += group * per_group
            day[row], ref = drawn[trial[row, segment]]
            at = start[row, segment]
            one = self.reader.read_into(ref, features[row, at : at + ref.bins])
            label = self._label(one, ref, shape.labels)
            bins[row, segment] = len(one.features)
            labels[group, place, : len(label)], length[group, place] = label, len(label)
            read.append(one)
        arrays: Any = (features, bins, day, labels, length, start, trial, slot)
        return read, Batch(*arrays)

    def batches(
        self, seed: int, start: int, stop: int, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of steps start .. stop - 1, read ahead by threads. `rows` as above."""

        def load(step: int) -> Batch:
            if step + _DISK_AHEAD < stop:
                later = self.rows(seed, step + _DISK_AHEAD)
                if not self.packed:
                    later = later[rows or slice(None)]
                self.reader.will_need([ref for _, ref in later])
            return self.batch(seed, step, rows)

        largest = max(shape.rows * shape.bins for shape in self.shapes.share)
        share = 1.0
        if rows is not None:
            first, last, _ = rows.indices(self._data.batch_rows)
            share = (last - first) / self._data.batch_rows
        return read_ahead(load, range(start, stop), self._ahead(int(share * largest)))


class EvaluationData(_Loader):
    """Every trial of a split, once, in batches of one shape per bucket."""

    def __init__(
        self,
        data: DataConfig,
        sessions: Sequence[str],
        split: str,
        min_bins: int,
        labels: bool,
        signal: SignalConfig | None = None,
    ):
        """List the trials. `signal`: how features are normalised as they are read.

        Raises:
          DataError: a file or trial cannot be used, or one fits no bucket.
        """
        super().__init__(data, sessions, signal)
        self._data = data
        self.sessions = tuple(sessions)
        """In day-index order."""
        self._day = {name: day for day, name in enumerate(sessions)}
        self.refs = self.reader.trials(sessions, split, min_bins=min_bins, labels_needed=labels)
        self.groups = self._grouped()
        """Of each batch, the indices into `refs` of all its rows."""

    def _grouped(self) -> list[list[int]]:
        by_bucket: dict[tuple[int, int], list[int]] = {}
        for index, ref in enumerate(self.refs):
            by_bucket.setdefault(bucket_of([ref], self.buckets), []).append(index)
        size = self._data.eval_batch_size
        return [
            indices[start : start + size]
            for _, indices in sorted(by_bucket.items())
            for start in range(0, len(indices), size)
        ]

    @property
    def batch_count(self) -> int:
        """Batches that `batches` yields."""
        return len(self.groups)

    def batches(self, rows: slice | None = None) -> Iterator[tuple[list[int], list[Trial], Batch]]:
        """Yield (indices into `refs`, their trials, padded batch). Further rows are zeros.

        Args:
          rows: of each global batch, those of this host. None: all. Indices and trials are those
            of these rows alone, and may be none. Every host yields as many batches, of the same
            buckets.

        Raises:
          DataError: a trial cannot be read. The text names it.
        """
        wanted = range(self._data.eval_batch_size)[rows or slice(None)]

        def load(group: int) -> tuple[list[int], list[Trial], Batch]:
            everything = self.groups[group]
            bucket = bucket_of([self.refs[i] for i in everything], self.buckets)
            indices = [everything[row] for row in wanted if row < len(everything)]
            refs = [self.refs[i] for i in indices]
            days = [self._day[ref.session] for ref in refs]
            pairs = list(zip(days, refs, strict=True))
            trials, batch = self.fill(pairs, bucket, len(wanted))
            return indices, trials, batch

        ahead = self._ahead(len(wanted) * self.buckets[-1][0])
        return read_ahead(load, range(len(self.groups)), ahead)
