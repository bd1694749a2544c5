"""Chooses the few static shapes that batches are padded to, so that little of them is padding.

A batch uses the first bucket that holds its longest trial. The longest of 64 random trials is far
longer than most trials, so buckets spread over the trials' lengths would never be used. Instead the
distribution of a batch's longest trial is computed exactly, from how training draws its batches,
and dynamic programming places the buckets on it. Evaluation sorts its trials by bucket. It counts
with a small share, so that short trials have a bucket too.

Only the bins are optimised. A bucket has labels enough for every trial that its bins hold, so that
a label never moves a batch to a larger bucket. The cost is small: per frame of 80 ms, CTC uses
2 L + 1 <= 1,001 states, the published model 44 million weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BUCKET_COUNT = 6
"""Each is one compilation of the step. A seventh saves little (see `BucketChoice`)."""
MULTIPLE = 16
"""Bins and labels are rounded up to this: a TPU lays out [time, features] in tiles of 8 rows of
float32 or 16 rows of bfloat16, and the compiler pads the last tile."""
EVALUATION_SHARE = 0.1
"""Weight of evaluation in the choice. In the published recipe it is about 1 % of the work."""

Lengths = Sequence[tuple[int, int]]
"""(bins of 20 ms, labels) per trial, with 0 labels where they are not known."""


@dataclass(frozen=True)
class BucketChoice:
    """Chosen buckets and their share of padding."""

    buckets: tuple[tuple[int, int], ...]
    """(bins, labels), ascending."""
    training_padding: float
    """Expected share of padding in the bins of a training batch, 0 to 1. 0.0 without trials."""
    evaluation_padding: float
    """Share of padding in the bins of evaluation batches, without rows that fill the last one."""

    def __str__(self) -> str:
        shapes = ", ".join(f"{bins}x{labels}" for bins, labels in self.buckets)
        return (
            f"buckets (bins x labels) {shapes}; padding {100 * self.training_padding:.1f} % of a "
            f"training batch, {100 * self.evaluation_padding:.1f} % in evaluation"
        )


def choose_buckets(
    lengths: Lengths,
    count: int,
    multiple: int,
    share_that_fits: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[tuple[int, int], ...]:
    """Return the at most `count` buckets with the fewest expected bins of a batch.

    Args:
      lengths: of all trials that must fit.
      count: of buckets, at least 1. Fewer are returned when more would save nothing.
      multiple: that bins and labels are rounded up to.
      share_that_fits: bins [N], ascending -> share of the batches, 0 to 1, whose longest trial has
        at most so many bins. By default every trial is its own batch.

    Returns:
      Ascending (bins, labels). The last holds every trial.

    Raises:
      ValueError: no lengths, or a count or multiple below 1.
    """
    if not lengths or count < 1 or multiple < 1:
        raise ValueError(
            f"found {len(lengths)} lengths, count {count}, multiple {multiple}; needed at least 1 "
            "of each"
        )
    bins = np.array([length for length, _ in lengths])
    labels = np.array([length for _, length in lengths])
    sizes = np.unique(_rounded(bins, multiple))
    share = (share_that_fits or _shares(bins))(sizes)
    chosen = sizes[_partition(sizes, share, count)]
    return tuple(
        (int(size), max(multiple, int(_rounded(labels[bins <= size].max(), multiple))))
        for size in chosen
    )


def _partition(sizes: np.ndarray, share: np.ndarray, count: int) -> list[int]:
    """Return the indices, ascending, of the sizes that are the best buckets.

    cost[k][j] is the expected size of the batches that fit size j when it is the k-th bucket:
    the minimum over i < j of cost[k-1][i] + size j times the share between i and j.
    """
    reached = np.concatenate([[0.0], share])
    cost = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)
    before: list[np.ndarray] = []
    best: tuple[float, int] = (np.inf, 0)
    for k in range(min(count, len(sizes))):
        # [j, i]: bucket j after bucket i; i = 0 stands for no bucket.
        options = cost[None, :] + sizes[:, None] * (reached[1:, None] - reached[None, :])
        options[np.arange(len(sizes) + 1)[None, :] > np.arange(len(sizes))[:, None]] = np.inf
        before.append(options.argmin(axis=1))
        cost = np.concatenate([[np.inf], options.min(axis=1)])
        # One more bucket must save more than a rounding error.
        if cost[-1] < best[0] * (1 - 1e-9):
            best = (float(cost[-1]), k)
    chosen, j = [], len(sizes)
    for k in range(best[1], -1, -1):
        chosen.append(j - 1)
        j = int(before[k][j - 1])
    return chosen[::-1]


def share_of_batches(
    bins_of_day: Sequence[Sequence[int]], days_per_batch: int, trials_per_day: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the probability that a batch drawn by `plan` has no trial longer than so many bins.

    With F_d the share of day d's trials that fit, a batch with the days S fits with probability
    prod over S of F_d ** trials_per_day, and the mean over all S of so many days is an elementary
    symmetric polynomial. Only sums and products of doubles are used: every host gets the same
    bits.

    Args:
      bins_of_day: of each day's training trials. Days with none are never drawn.
      days_per_batch: different days in a batch.
      trials_per_day: drawn with replacement.

    Returns:
      Function bins [N] -> probabilities [N].

    Raises:
      ValueError: fewer days have trials than a batch needs.
    """
    days = [np.sort(np.asarray(bins)) for bins in bins_of_day if len(bins)]
    if len(days) < days_per_batch:
        raise ValueError(f"found {len(days)} days with trials; needed {days_per_batch}")

    def share(sizes: np.ndarray) -> np.ndarray:
        sums = [np.ones(len(sizes))] + [np.zeros(len(sizes)) for _ in range(days_per_batch)]
        for bins in days:
            fits = np.searchsorted(bins, sizes, side="right") / len(bins)
            power = np.ones(len(sizes))
            for _ in range(trials_per_day):
                power = power * fits
            for number in range(days_per_batch, 0, -1):
                sums[number] = sums[number] + power * sums[number - 1]
        return sums[-1] / math.comb(len(days), days_per_batch)

    return share


def share_of_epochs(bins: Sequence[int], rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the probability that a batch cut from a shuffled epoch has no trial longer than so
    many bins, as `share_of_batches` does. Its rows are drawn without replacement."""
    ordered = np.sort(np.asarray(bins))

    def share(sizes: np.ndarray) -> np.ndarray:
        fit = np.searchsorted(ordered, sizes, side="right")
        found = np.ones(len(sizes))
        for row in range(min(rows, len(ordered))):
            found = found * np.maximum(fit - row, 0) / (len(ordered) - row)
        return found

    return share


def _share_of_plan(
    plan: str, bins_of_day: Sequence[Sequence[int]], days_per_batch: int, trials_per_day: int
) -> Callable[[np.ndarray], np.ndarray]:
    if plan == "epochs":
        everything = [bins for day in bins_of_day for bins in day]
        return share_of_epochs(everything, days_per_batch * trials_per_day)
    # With too few days training raises an error itself. Evaluating such a folder is possible.
    return share_of_batches(bins_of_day, min(days_per_batch, len(bins_of_day)), trials_per_day)


def buckets_of_data(
    training: Sequence[Lengths],
    evaluation: Lengths,
    days_per_batch: int,
    trials_per_day: int,
    plan: str = "days",
    count: int = BUCKET_COUNT,
    multiple: int = MULTIPLE,
) -> BucketChoice:
    """Choose buckets for training batches and for evaluation, from all lengths.

    Args:
      training: lengths of each day's training trials.
      evaluation: lengths of the trials of val and test.
      days_per_batch: different days in a training batch.
      trials_per_day: rows per day of a training batch.
      plan: of training batches, "days" or "epochs".
      count: of buckets, at most.
      multiple: that bins and labels are rounded up to.

    Raises:
      ValueError: no trials at all.
    """
    bins_of_day = [[bins for bins, _ in day] for day in training if day]
    everything = [length for day in training for length in day] + list(evaluation)
    if not everything:
        raise ValueError("found no trials; needed the lengths of at least one")
    evaluation_bins = np.array([bins for bins, _ in evaluation])
    in_training = _share_of_plan(plan, bins_of_day, days_per_batch, trials_per_day)
    in_evaluation = _shares(evaluation_bins) if evaluation else in_training
    weight = EVALUATION_SHARE if bins_of_day else 1.0

    def fits(sizes: np.ndarray) -> np.ndarray:
        return (1 - weight) * in_training(sizes) + weight * in_evaluation(sizes)

    buckets = choose_buckets(everything, count, multiple, fits)
    return BucketChoice(
        buckets,
        training_padding(buckets, bins_of_day, days_per_batch, trials_per_day, plan)
        if bins_of_day
        else 0.0,
        _padding(buckets, in_evaluation, float(evaluation_bins.mean())) if evaluation else 0.0,
    )


def training_padding(
    buckets: Sequence[tuple[int, int]],
    bins_of_day: Sequence[Sequence[int]],
    days_per_batch: int,
    trials_per_day: int,
    plan: str = "days",
) -> float:
    """Return the expected share of padding among the bins of a training batch.

    Args:
      buckets: (bins, labels), ascending. The last one holds all trials.
      bins_of_day: of each day's training trials. Days with none are never drawn.
      days_per_batch: different days in a batch.
      trials_per_day: rows of each day.
      plan: "days" or "epochs".
    """
    days = [list(bins) for bins in bins_of_day if bins]
    drawn = _share_of_plan(plan, days, days_per_batch, trials_per_day)
    return _padding(buckets, drawn, mean_bins(days, plan))


def mean_bins(bins_of_day: Sequence[Sequence[int]], plan: str) -> float:
    """Return the expected bins of a trial that a plan draws. Days without trials do not count."""
    days = [bins for bins in bins_of_day if len(bins)]
    # A day counts as often as its trials are drawn.
    weights = None if plan == "days" else [len(bins) for bins in days]
    return float(np.average([np.mean(bins) for bins in days], weights=weights))


def _padding(
    buckets: Sequence[tuple[int, int]],
    share_that_fits: Callable[[np.ndarray], np.ndarray],
    mean_bins: float,
) -> float:
    """Return the expected share of padding, for trials of `mean_bins` bins on average."""
    sizes = np.array([bins for bins, _ in buckets])
    share = np.diff(share_that_fits(sizes), prepend=0.0)
    return 1 - mean_bins / float((sizes * share).sum())


def _shares(bins: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    ordered = np.sort(bins)
    return lambda sizes: np.searchsorted(ordered, sizes, side="right") / len(ordered)


def _rounded(lengths: np.ndarray, multiple: int) -> np.ndarray:
    return -(-lengths // multiple) * multiple
