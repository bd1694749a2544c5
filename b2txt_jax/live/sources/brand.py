"""Bins from a graph of BRAND: raw arrays whose type and size only its parameters name."""

from __future__ import annotations

import collections
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from b2txt_jax.live.sources.interface import Begin, Bin, End, Event, SourceError
from lm_server.client.brand import Node, number_of
from lm_server.client.connection import LOST, Backoff, parse_id, refusal, text

BIN_MS = 20
_MOST_ENTRIES = 256
_DTYPES = ("float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32")


@dataclass(frozen=True)
class BrandInput:
    """Where features are in a graph, by the node's parameters."""

    stream: str
    field: str
    dtype: str
    features: int
    bin_ms: int = BIN_MS
    """20, or 10: then two bins become one, counts of the first half of the features added, power of
    the second averaged."""
    marks: str | None = None
    """Stream with a field `mark`, begin or end of a sentence, and `name`."""

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise SourceError(f"input_dtype is {self.dtype!r}; needed one of {', '.join(_DTYPES)}")
        if self.bin_ms not in (BIN_MS, BIN_MS // 2):
            raise SourceError(f"bin_ms is {self.bin_ms}; needed 20 or 10")


@dataclass(frozen=True)
class Origin:
    """The entry that the newest bin comes from."""

    sync: bytes = b"{}"
    number: int | None = None


class BrandStream:
    """Entries of the graph from now on. `read` returns a bin at a time, so that `origin` is its."""

    def __init__(self, node: Node, where: BrandInput) -> None:
        self._redis: Any = node.redis
        self._where = where
        self.origin = Origin()
        self._stop = threading.Event()
        self._backoff = Backoff(self._stop)
        self._quiet = False
        names = [where.stream, *([where.marks] if where.marks else [])]
        self._seen: dict[str, Any] = {name: self._newest(name) for name in names}
        self._waiting: collections.deque[tuple[Event, Origin]] = collections.deque()
        self._half: tuple[int | None, np.ndarray] | None = None

    def _newest(self, name: str) -> Any:
        found = self._redis.xrevrange(name, count=1)
        return found[0][0] if found else "0-0"

    def read(self, timeout: float) -> list[Event] | None:
        """Return the next event. See `Source.read`.

        Raises:
          SourceError: Redis refuses to read a stream.
        """
        if not self._waiting:
            self._fetch(timeout)
        if not self._waiting:
            return []
        event, self.origin = self._waiting.popleft()
        return [event]

    def _fetch(self, timeout: float) -> None:
        try:
            if self._quiet or self._backoff.failing:
                for name, seen in self._seen.items():
                    if parse_id(self._newest(name)) < parse_id(seen):
                        self._seen[name] = "0-0"
            found = self._redis.xread(self._seen, _MOST_ENTRIES, max(1, int(1000 * timeout)))
        except LOST as error:
            if refusal(error):
                raise SourceError(
                    f"Redis does not let us read {' and '.join(self._seen)} ({error}); needed "
                    "streams, as the parameters input_stream and mark_stream"
                ) from error
            self._backoff.failed()
            return
        self._backoff.worked()
        self._quiet = not found
        now = time.monotonic()
        entries = [(text(name), id_, fields) for name, listed in found for id_, fields in listed]
        for name, id_, fields in sorted(entries, key=self._place):
            self._seen[name] = id_
            if name == self._where.marks:
                self._mark(fields)
            else:
                self._bins(fields, now)

    def _place(self, entry: tuple[str, Any, dict[bytes, bytes]]) -> tuple[int, int, int]:
        """Order the entries of both streams by time. Ids say nothing of the order within one
        millisecond: a sentence begins before its bins, and ends after them."""
        name, id_, fields = entry
        milliseconds, number = parse_id(id_)
        rank = 1 if name == self._where.stream else 2 * (fields.get(b"mark") == b"end")
        return milliseconds, rank, number

    def _mark(self, fields: dict[bytes, bytes]) -> None:
        mark = fields.get(b"mark", b"")
        if mark == b"begin":
            self._waiting.append((Begin(text(fields.get(b"name", b""))), self.origin))
        elif mark == b"end":
            self._waiting.append((End(), self.origin))

    def _bins(self, fields: dict[bytes, bytes], now: float) -> None:
        where = self._where
        payload, number = fields.get(where.field.encode(), b""), number_of(fields.get(b"i"))
        origin = Origin(fields.get(b"sync", b"{}"), number)
        size = np.dtype(where.dtype).itemsize
        values = np.frombuffer(payload[: len(payload) // size * size], where.dtype)
        if len(values) == where.features:
            values = values.astype(np.float32)
            if where.bin_ms == BIN_MS:
                self._waiting.append((Bin(values, number, now), origin))
            else:
                self._paired(values, number, now, origin)
        elif len(values) and len(values) % where.features == 0 and where.bin_ms == BIN_MS:
            # Several bins in an entry have one number, which counts entries.
            rows = values.reshape(-1, where.features).astype(np.float32)
            first = None if number is None else number * len(rows)
            self._waiting += [
                (Bin(row, None if first is None else first + place, now), origin)
                for place, row in enumerate(rows)
            ]
        else:
            # Of another width: counted as such, and replaced.
            number = number if number is None or where.bin_ms == BIN_MS else number // 2
            self._waiting.append((Bin(values.astype(np.float32), number, now), origin))

    def _paired(self, values: np.ndarray, number: int | None, now: float, origin: Origin) -> None:
        """Keep the first half of a bin, or complete it. One whose other half is lost is missing."""
        pair = None if number is None else number // 2
        held, self._half = self._half, None
        second = number is None or number % 2 == 1
        if held is not None and held[0] == pair and second:
            middle = self._where.features // 2
            merged = held[1] + values
            merged[middle:] /= 2
            self._waiting.append((Bin(merged, pair, now), origin))
        elif held is None and number is None:
            self._half = (None, values)
        elif number is not None and number % 2 == 0:
            self._half = (pair, values)

    def close(self) -> None:
        """Stop waiting. The connection belongs to the node."""
        self._stop.set()
