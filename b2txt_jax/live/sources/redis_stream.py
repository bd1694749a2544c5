"""Bins from a Redis stream, in the plainest form (docs/realtime.md has the fields)."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from b2txt_jax.live.sources.interface import Begin, Bin, End, Event, SourceError
from lm_server.client.connection import (
    LOST,
    Backoff,
    connect,
    parse_id,
    redis_client,
    refusal,
)

_MOST_ENTRIES = 256
_WAIT_SECONDS = 10.0


def split_url(url: str, option: str) -> tuple[str, str]:
    """Split `redis://host:6379/0/NAME` into the Redis's URL and the stream's name, the last part.

    Raises:
      SourceError: there is no name. `option` is where the URL was given.
    """
    place, _, query = url.partition("?")
    base, _, name = place.rpartition("/")
    scheme = base.partition("://")
    if not scheme[1] or not scheme[2].strip("/") or not name or name.isdigit():
        raise SourceError(
            f"{option} names no stream; needed a Redis and the name of a stream in it, such as "
            "redis://127.0.0.1:6379/0/features or unix:///run/redis.sock/features"
        )
    return base + (f"?{query}" if query else ""), name


class RedisStream:
    """Entries of a stream from now on. Lost connections are made again."""

    def __init__(self, url: str, features: int) -> None:
        """Connect.

        Args:
          url: of the Redis, with the name of the stream at its end.
          features: of a bin.

        Raises:
          SourceError: the URL names no stream, or Redis refuses to read it.
          RedisUnavailableError: no Redis answers.
        """
        address, self._stream = split_url(url, "--source")
        self._features = features
        self._stop = threading.Event()
        connect(address, _WAIT_SECONDS, self._stop).close()
        self._redis: Any = redis_client(address)
        self._backoff = Backoff(self._stop)
        self._quiet = False
        try:
            newest = self._redis.xrevrange(self._stream, count=1)
        except LOST as error:
            raise self._refused(error) from error
        self._seen = newest[0][0] if newest else "0-0"

    def _refused(self, error: Exception) -> SourceError:
        return SourceError(
            f"Redis does not let us read {self._stream!r} ({error}); needed a stream with a field "
            "features, float32, and the right to read it"
        )

    def read(self, timeout: float) -> list[Event] | None:
        """Return the bins and marks of new entries. See `Source.read`.

        Raises:
          SourceError: Redis refuses to read the stream.
        """
        try:
            if self._quiet or self._backoff.failing:
                # A Redis that lost its memory, or whose clock went back before the stream was
                # deleted, counts from lower ids.
                newest = self._redis.xrevrange(self._stream, count=1)
                if newest and parse_id(newest[0][0]) < parse_id(self._seen):
                    self._seen = "0-0"
            block = max(1, int(1000 * timeout))
            found = self._redis.xread({self._stream: self._seen}, _MOST_ENTRIES, block)
        except LOST as error:
            if refusal(error):
                raise self._refused(error) from error
            self._backoff.failed()
            return []
        self._backoff.worked()
        self._quiet = not found
        events: list[Event] = []
        for _, entries in found:
            for id_, fields in entries:
                self._seen = id_
                events += self._events(fields, time.monotonic())
        return events

    def _events(self, fields: dict[bytes, bytes], now: float) -> list[Event]:
        mark = fields.get(b"mark", b"")
        bins = self._bins(fields, now) if b"features" in fields or not mark else []
        if mark == b"begin":
            return [Begin(fields.get(b"name", b"").decode(errors="replace")), *bins]
        return [*bins, End()] if mark == b"end" else bins

    def _bins(self, fields: dict[bytes, bytes], now: float) -> list[Event]:
        payload, number = fields.get(b"features", b""), fields.get(b"i", b"")
        first = int(number) if number.isdigit() else None
        width = 4 * self._features
        if not payload or len(payload) % width:
            # One bin of another width: counted as such, and replaced.
            values = np.frombuffer(payload[: len(payload) // 4 * 4], "<f4")
            return [Bin(values, first, now)]
        rows = np.frombuffer(payload, "<f4").reshape(-1, self._features)
        return [
            Bin(row, None if first is None else first + offset, now)
            for offset, row in enumerate(rows)
        ]

    def close(self) -> None:
        """Close the connection."""
        self._stop.set()
        self._redis.close()
