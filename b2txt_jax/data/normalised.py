"""A reader that normalises trials as a live system would: bin after bin, session after session."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from b2txt_jax.config import SignalConfig
from b2txt_jax.data.trial import SPLITS, Reader, Trial, TrialRef
from b2txt_jax.signal.rolling import BIN_SECONDS, Statistics, cold, normalise

_WINDOWS = 8
"""Windows of the session before from which a session starts. Earlier bins have no weight left."""


class NormalisedReader(Reader):
    """Another reader's trials with a log transform and a rolling z-score (`signal.log`,
    `signal.rolling_seconds`).

    A session's trials follow one another by block and number, those of all splits. The first
    starts from the statistics of the session before. When a trial of a session is first read, the
    whole session is, once.
    """

    suffix: ClassVar[str] = ""

    def __init__(self, reader: Reader, signal: SignalConfig) -> None:
        """`reader` has the raw features."""
        super().__init__(reader.root, reader.feature_count)
        self._raw = reader
        self._signal = signal
        self._before: dict[str, dict[tuple[Path, str], Statistics]] = {}
        self._lock = threading.Lock()
        self.suffix = reader.suffix  # type: ignore[misc]

    @classmethod
    def holds(cls, root: Path) -> bool:
        """Return False: it is no format of its own."""
        return False

    @property
    def sessions(self) -> tuple[str, ...]:
        """Those of the other reader."""
        return self._raw.sessions

    def _list(self, session: str, split: str, labels_needed: bool) -> list[TrialRef] | None:
        return self._raw._list(session, split, labels_needed)

    def read_into(self, ref: TrialRef, out: np.ndarray) -> Trial:
        """Read and normalise a trial. See `Reader.read_into`."""
        trial = self._raw.read_into(ref, out)
        trial.features[:] = normalise(trial.features, self.before(ref), self._signal)[0]
        return trial

    def sample(self, ref: TrialRef) -> Trial:
        """Read some bins, raw: they are for recognising the data."""
        return self._raw.sample(ref)

    def will_need(self, refs: Sequence[TrialRef]) -> None:
        """Start to fetch the trials in the background."""
        self._raw.will_need(refs)

    def close(self) -> None:
        """Close the other reader's files."""
        self._raw.close()

    def before(self, ref: TrialRef) -> Statistics:
        """Return the statistics at a trial's first bin."""
        with self._lock:  # Threads read at once, and one pass over a session is enough.
            if ref.session not in self._before:
                self._before[ref.session] = self._pass(ref.session)
            return self._before[ref.session][ref.path, ref.key]

    def after(self, session: str) -> Statistics:
        """Return the statistics at a session's end, from which the next one starts."""
        wanted = _WINDOWS * self._signal.rolling_seconds / BIN_SECONDS
        last: list[TrialRef] = []
        for ref in reversed(self._in_order(session)):
            if sum(one.bins for one in last) < wanted:
                last.insert(0, ref)
        statistics = cold(self.feature_count)
        for ref in last:
            statistics = normalise(self._raw.read(ref).features, statistics, self._signal)[1]
        return statistics

    def _in_order(self, session: str) -> list[TrialRef]:
        listed = [self._raw._list(session, split, False) or [] for split in SPLITS]
        return sorted((ref for refs in listed for ref in refs), key=lambda r: (r.block, r.trial))

    def _pass(self, session: str) -> dict[tuple[Path, str], Statistics]:
        earlier = [name for name in self._raw.together(session) if name < session]
        statistics = self.after(earlier[-1]) if earlier else cold(self.feature_count)
        found = {}
        for ref in self._in_order(session):
            found[ref.path, ref.key] = statistics
            statistics = normalise(self._raw.read(ref).features, statistics, self._signal)[1]
        return found
