"""Lengths like those of the published recordings (T15), where no data is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from b2txt_jax.data.batches.buckets import BucketChoice
from b2txt_jax.data.pack import PackSettings, write_manifest, write_split
from b2txt_jax.data.trial import Trial, TrialRef

FEATURES = 512
SESSIONS = 45
TRIALS = 180
"""Training trials of a session: 8,100 in all, 8,072 in the published set."""
BINS_PER_LABEL = 9


def typical_bins(trials: int, day: int) -> np.ndarray:
    """Draw the bins of a day's trials: 100 to 2,500, about 800 on average, different per day."""
    random = np.random.default_rng([1, day])
    drawn = np.exp(random.normal(np.log(random.uniform(600, 900)), 0.4, trials))
    return np.clip(drawn, 100, 2500).astype(int)


def typical_lengths(sessions: int = SESSIONS) -> list[list[tuple[int, int]]]:
    """Return (bins, labels) of each session's training trials."""
    return [
        [(int(bins), int(bins) // BINS_PER_LABEL) for bins in typical_bins(TRIALS, day)]
        for day in range(sessions)
    ]


def typical_trials(
    session: str, day: int, count: int, bins: tuple[int, int] | None = None
) -> Iterator[Trial]:
    """Yield trials of noise with labels of a fitting length.

    Args:
      session: its name.
      day: index, which the trials depend on.
      count: of trials.
      bins: fewest and most of a trial. None: like the recordings'.
    """
    random = np.random.default_rng([2, day])
    noise = random.standard_normal((5000, FEATURES), dtype=np.float32)
    lengths = typical_bins(count, day) if bins is None else random.integers(*bins, count)
    for number, length in enumerate(lengths):
        start = random.integers(0, len(noise) - length)
        labels = random.integers(1, 41, int(length) // BINS_PER_LABEL).astype(np.int32)
        key = f"trial_{number:04d}"
        ref = TrialRef(session, key, Path(session), int(length), len(labels), 1, number)
        yield Trial(ref, noise[start : start + length], labels, "a sentence")


def session_name(day: int) -> str:
    """Return the name of a made-up session, in the order of the days."""
    return f"t15.2023.{1 + day // 28:02d}.{1 + day % 28:02d}"


def write_typical(
    folder: Path, dtype: str, sessions: int, trials: int, bins: tuple[int, int] | None = None
) -> BucketChoice:
    """Write packed sessions of noise, each with so many training trials. `bins` as above."""
    settings = PackSettings(dtype=dtype)
    packed = {}
    for day in range(sessions):
        name = session_name(day)
        made = typical_trials(name, day, trials, bins)
        packed[name, "train"] = write_split(folder, name, "train", made, settings, {})
    return write_manifest(folder, packed, settings)
