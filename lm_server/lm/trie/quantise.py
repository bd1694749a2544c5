"""Quantisation of probabilities and back-offs: tables of bins with equally many values each.

Source: M. Federico and N. Bertoldi, "How many bits are needed to store probabilities for
phrase-based translation?" (2006), as in KenLM's quantised tries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MAX_BITS = 25
_SAMPLE = 1 << 23
"""Largest number of values that bins are computed from. More values are sampled evenly."""
_NO_EXTENSION, _EXTENSION = 0, 1
"""The first two bins of back-offs: zero without and with a longer n-gram."""


@dataclass(frozen=True)
class Tables:
    """The bins of one order, float32 [2 ** bits] each.

    They are ascending, those of back-offs from the third on. The highest order has no back-offs.
    """

    log10: np.ndarray
    backoff: np.ndarray | None

    def encode_log10(self, values: np.ndarray) -> np.ndarray:
        """Return the indices of the nearest bins."""
        return _nearest(self.log10, values)

    def encode_backoff(self, values: np.ndarray) -> np.ndarray:
        """Return the indices of the nearest bins. The two signs of zero have their own bins."""
        assert self.backoff is not None
        zero = np.where(np.signbit(values), _NO_EXTENSION, _EXTENSION)
        return np.where(values == 0, zero, 2 + _nearest(self.backoff[2:], values))


def train(log10: np.ndarray, backoff: np.ndarray | None, bits: int) -> Tables:
    """Compute the bins of one order. `backoff` is None for the highest."""
    tables = None
    if backoff is not None:
        values = _sample(backoff)
        bins = _bins(values[values != 0], (1 << bits) - 2)
        tables = np.concatenate([np.array([-0.0, 0.0], np.float32), bins])
    return Tables(_bins(_sample(log10), 1 << bits), tables)


def _sample(values: np.ndarray) -> np.ndarray:
    return np.asarray(values[:: -(-len(values) // _SAMPLE) or 1])


def _bins(values: np.ndarray, count: int) -> np.ndarray:
    """Return the means of `count` equal parts of the sorted values.

    An empty part has the mean of the part before it.
    """
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
