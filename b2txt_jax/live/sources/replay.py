"""A recorded session's trials as if they were recorded now."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from b2txt_jax.data.trial import Reader, TrialRef
from b2txt_jax.live.sources.interface import Begin, Bin, End, Event
from b2txt_jax.signal.rolling import BIN_SECONDS

_AT_ONCE = 64
"""Most events of one `read`."""


class Replay:
    """Trials one after the other, each from a `Begin` to an `End`."""

    def __init__(self, reader: Reader, refs: Sequence[TrialRef], speed: float = 1.0) -> None:
        """`speed`: 1 is that of the recording. inf: as fast as they are read."""
        self._events = self._of(reader, refs)
        self._period = BIN_SECONDS / speed
        self._next: Event | None = next(self._events, None)
        self._due: float | None = None

    def _of(self, reader: Reader, refs: Sequence[TrialRef]) -> Iterator[Event]:
        number = 0
        for ref in refs:
            trial = reader.read(ref)
            yield Begin(ref.name, trial.sentence)
            # As the session was recorded: without the zeros of other participants' channels.
            for features in trial.features[:, : reader.width(ref.session)]:
                yield Bin(features, number, 0.0)
                number += 1
            yield End()

    def read(self, timeout: float) -> list[Event] | None:
        """Return the events that are due. A bin's time is when it was due, late or not."""
        if self._next is None:
            return None
        started = time.monotonic()
        if self._due is None:
            self._due = started
        if self._period:
            time.sleep(max(0.0, min(timeout, self._due - started)))
        found: list[Event] = []
        while self._next is not None and len(found) < (_AT_ONCE if self._period else 1):
            now = time.monotonic()
            event = self._next
            if isinstance(event, Bin):
                if self._period and self._due > now:
                    break
                due = self._due if self._period else now
                event = Bin(event.features, event.sequence, due)
                self._due += self._period
            found.append(event)
            self._next = next(self._events, None)
        return found

    def close(self) -> None:
        """Do nothing: the reader belongs to the caller."""
