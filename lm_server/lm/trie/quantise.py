"""Probabilities and back-offs in a few bits: tables of bins that hold equally many values each.

Source: M. Federico and N. Bertoldi, "How many bits are needed to store probabilities for
phrase-based translation?" (2006), as KenLM's quantised tries have it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MAX_BITS = 25
_SAMPLE = 1 << 23
"""Bins of more values than this are found from a sample of every so many-th."""
_NO_EXTENSION, _EXTENSION = 0, 1
"""The first two bins of back-offs: zero where no longer n-gram follows, and where one does."""


@dataclass(frozen=True)
class Tables:
    """The bins of one order: float32 [2 ** bits] each, ascending (the back-offs' from the third
    on); no back-offs for the highest order."""

    log10: np.ndarray
    backoff: np.ndarray | None

    def encode_log10(self, values: np.ndarray) -> np.ndarray:
        """Numbers of the nearest bins."""
        return _nearest(self.log10, values)

    def encode_backoff(self, values: np.ndarray) -> np.ndarray:
        """Numbers of the nearest bins; zeros have bins of their own by their sign."""
        assert self.backoff is not None
        zero = np.where(np.signbit(values), _NO_EXTENSION, _EXTENSION)
        return np.where(values == 0, zero, 2 + _nearest(self.backoff[2:], values))


def train(log10: np.ndarray, backoff: np.ndarray | None, bits: int) -> Tables:
    """Bins for the values of one order; `backoff` is None for the highest."""
    tables = None
    if backoff is not None:
        values = _sample(backoff)
        bins = _bins(values[values != 0], (1 << bits) - 2)
        tables = np.concatenate([np.array([-0.0, 0.0], np.float32), bins])
    return Tables(_bins(_sample(log10), 1 << bits), tables)


def _sample(values: np.ndarray) -> np.ndarray:
    return np.asarray(values[:: -(-len(values) // _SAMPLE) or 1])


def _bins(values: np.ndarray, count: int) -> np.ndarray:
    """Means of `count` parts of the sorted values; an empty part has the mean of the one before."""
    values = np.sort(values)
    edges = len(values) * np.arange(count + 1) // count
    sizes = np.diff(edges)
    filled = np.flatnonzero(sizes)
    centres = np.full(count, -math.inf, np.float32)
    if len(filled):
        sums = np.add.reduceat(values.astype(np.float64), edges[filled])
        centres[filled] = sums / sizes[filled]
        before = np.searchsorted(filled, np.arange(count), "right") - 1
        centres = np.where(before >= 0, centres[filled[np.maximum(before, 0)]], centres)
    return centres.astype(np.float32)


def _nearest(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    above = np.searchsorted(table, values, "left")
    last = len(table) - 1
    lower, upper = np.clip(above - 1, 0, last), np.clip(above, 0, last)
    nearer_lower = values - table[lower] < table[upper] - values
    return np.where((above > 0) & ((above > last) | nearer_lower), lower, upper)
