"""Bins as a source sends them become bins as the model needs them: none missing, none twice, all
finite, normalised. What was wrong is counted."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

import numpy as np

from b2txt_jax.config import SignalConfig
from b2txt_jax.live.sources.interface import Bin
from b2txt_jax.signal.rolling import Statistics, normalise

LONGEST_GAP = 50
"""Bins. So many missing ones are filled. A longer gap is a pause, or a source that started anew."""
_DEAD_CHANNEL_BINS = 500
_DEAD_ARRAY_BINS = 25
_ARRAYS = 4


@dataclass
class Health:
    """What was wrong with the bins so far, and what is wrong with the channels now."""

    bins: int = 0
    dropped: int = 0
    """Missing by their numbers, each replaced by the mean."""
    late: int = 0
    """Arrived after they were replaced, and left out."""
    doubled: int = 0
    """Arrived twice, and left out."""
    jumps: int = 0
    """Numbers that went on more than a second away, or came again with other values: a pause or a
    restart of the source."""
    wrong_width: int = 0
    """Of another number of channels, each replaced by the mean."""
    missing_values: int = 0
    """NaN or infinite, each replaced by the mean."""
    missing_channels: tuple[int, ...] = ()
    """NaN in the last bin."""
    dead_channels: tuple[int, ...] = ()
    """Without a change for 10 s."""
    dead_arrays: tuple[int, ...] = ()
    """All of whose channels have not changed for 0.5 s, counted from 0."""

    @property
    def problems(self) -> dict[str, int]:
        """Return what is not zero, by name."""
        counts = {
            name: value if isinstance(value, int) else len(value)
            for name, value in vars(self).items()
            if name != "bins"
        }
        return {name.replace("_", " "): count for name, count in counts.items() if count}


@dataclass
class Intake:
    """The state from bin to bin."""

    features: int
    """Of a bin."""
    signal: SignalConfig
    statistics: Statistics
    health: Health = field(default_factory=Health)
    _expected: int | None = None
    _replaced: collections.deque[int] = field(
        default_factory=lambda: collections.deque(maxlen=4 * LONGEST_GAP)
    )
    _taken: dict[int, np.ndarray] = field(default_factory=dict)
    """The bins of the last second as they arrived, by number."""
    _last: np.ndarray | None = None
    _unchanged: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    def take(self, bin_: Bin) -> tuple[np.ndarray, np.ndarray]:
        """Return the bins that are ready: raw with NaN where missing, and normalised, both float32
        [N, D]. N is 0 for one that is late or doubled, and more than 1 after a gap.
        """
        missed = self._missed(bin_)
        raw = np.full(((missed or 0) + 1, self.features), np.nan, np.float32)
        if missed is None:
            return raw[:0], raw[:0]
        if np.shape(bin_.features) == (self.features,):
            raw[-1] = bin_.features
            raw[-1][~np.isfinite(raw[-1])] = np.nan
            absent = np.isnan(raw[-1])
            self.health.missing_channels = tuple(np.flatnonzero(absent).tolist())
            self.health.missing_values += int(absent.sum())
            raw[-1, self._dead(raw[-1])] = np.nan
        else:
            self.health.wrong_width += 1
        self.health.bins += len(raw)
        normal, self.statistics = normalise(raw, self.statistics, self.signal)
        return raw, np.nan_to_num(normal, nan=0.0)

    def _missed(self, bin_: Bin) -> int | None:
        """Return how many bins are missing before this one. None: it is to be left out.

        A number of the last second is left out where its bin was replaced, or is doubled. Otherwise
        it belongs to a new count: the source started anew.
        """
        number, expected, health = bin_.sequence, self._expected, self.health
        if number is None:
            return 0
        missed = 0 if expected is None else number - expected
        if -LONGEST_GAP <= missed < 0:
            if number in self._replaced:
                self._replaced.remove(number)
                self._taken[number] = bin_.features
                health.late += 1
                return None
            if self._is_doubled(number, bin_.features):
                health.doubled += 1
                return None
        if not 0 <= missed <= LONGEST_GAP:
            health.jumps += 1
            missed = 0
            self._replaced.clear()
            self._taken.clear()
        health.dropped += missed
        self._replaced.extend(range(number - missed, number))
        self._expected = number + 1
        self._taken[number] = bin_.features
        for old in range(number - LONGEST_GAP - missed, number - LONGEST_GAP + 1):
            self._taken.pop(old, None)
        return missed

    def _is_doubled(self, number: int, features: np.ndarray) -> bool:
        """Return whether a bin arrived before with the same values. One of another width says
        nothing about values."""
        before = self._taken.get(number)
        if before is None:
            return False
        return before.shape != features.shape or np.array_equal(before, features, equal_nan=True)

    def _dead(self, values: np.ndarray) -> np.ndarray:
        """Return which channels do not record, bool [D]. One that is NaN is none of them."""
        if self._last is None:
            self._unchanged = np.zeros(self.features, int)
        else:
            self._unchanged = np.where(values == self._last, self._unchanged + 1, 0)
        self._last = values.copy()
        dead: np.ndarray = np.greater_equal(self._unchanged, _DEAD_CHANNEL_BINS)
        self.health.dead_channels = tuple(np.flatnonzero(dead).tolist())
        self.health.dead_arrays = ()
        if self.features % (2 * _ARRAYS) == 0:
            # Two features a channel: threshold crossings of all arrays, then their band power.
            by_array = self._unchanged.reshape(2, _ARRAYS, -1)
            gone = np.asarray((by_array >= _DEAD_ARRAY_BINS).all(axis=(0, 2)))
            self.health.dead_arrays = tuple(np.flatnonzero(gone).tolist())
            dead |= np.broadcast_to(gone[None, :, None], by_array.shape).reshape(-1)
        return dead
