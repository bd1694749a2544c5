"""Lengths like those of the published recordings (T15), where no data is at hand."""

from __future__ import annotations

import numpy as np

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
