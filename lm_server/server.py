"""The Redis loop around a session: reads entries in the order of their ids, writes the answers.

One blocking XREAD waits on all input streams, so an entry is taken up the moment it arrives. Ids
are the order: Redis gives them from its clock in milliseconds. Entries of one millisecond on
different streams are taken in the order reset, update_params, input, finalize.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lm_server.errors import UserError
from lm_server.protocol import Streams
from lm_server.session import Message, Session

CONTEXT_KEY = "contextual_decoding_current_context"
OUTPUT_ENTRIES = 10_000
"""Entries that an output stream keeps, about; older ones go."""
_BLOCK_MS = 500
_BATCH = 16
_HOUSEKEEPING_SECONDS = 0.1
_LONGEST_PAUSE = 5.0

_log = logging.getLogger(__name__)

EntryId = tuple[int, int]


class RedisUnavailableError(UserError, RuntimeError):
    """Redis cannot be reached or used; says where it was looked for and what it answered."""


@dataclass(frozen=True)
class _Entry:
    stream: str
    id: EntryId
    fields: Mapping[str, bytes]


def shown_url(url: str) -> str:
    """The URL without its password, whichever of the two ways it is given in."""
    shown = re.sub(r"([?&]password=)[^&]*", r"\1***", url)
    # Up to the last @, so that an @ within the password does not show the rest of it.
    return re.sub(r"(://[^:@/]*:).*@", r"\1***@", shown)


def connect(url: str, wait_seconds: float, stop: threading.Event) -> redis.Redis:
    """A client of the Redis at `url` (redis://, rediss:// or unix://, with user and password if
    need be).

    Args:
      url: where it is.
      wait_seconds: how long to try while nothing answers.
      stop: ends the wait.

    Raises:
      RedisUnavailableError: the URL is wrong, the password is refused, or nothing answers in time.
    """
    try:
        # RESP2 is what every Redis since 2.0 speaks; redis-py would choose RESP3, whose XREAD has
        # another shape. Retrying is left to the loop, which knows which commands may be sent twice.
        client = redis.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=30.0,
            socket_connect_timeout=5.0,
            retry=Retry(NoBackoff(), 0),
        )
    except (ValueError, TypeError) as error:
        raise RedisUnavailableError(
            f"{shown_url(url)} is no Redis URL ({error}); needed redis://HOST:PORT/DB"
        ) from error
    deadline = time.monotonic() + wait_seconds
    pause = 0.05
    while True:
        try:
            client.ping()
            return client
        except (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError) as error:
            raise RedisUnavailableError(
                f"Redis at {shown_url(url)} refuses us ({error}): check the password"
            ) from error
        except redis.exceptions.ResponseError as error:
            raise RedisUnavailableError(
                f"Redis at {shown_url(url)} refuses us ({error}): check user and rights"
            ) from error
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
            if stop.is_set() or time.monotonic() >= deadline:
                raise RedisUnavailableError(
                    f"no Redis answers at {shown_url(url)} after {wait_seconds:g} s ({error}): "
                    "start one, or give its URL with --redis, or use --embedded-redis"
                ) from error
            stop.wait(pause)
            pause = min(2 * pause, 1.0)


class Server:
    """Serves one session on a Redis until it is told to stop."""

    def __init__(
        self,
        client: redis.Redis,
        session: Session,
        streams: Streams | None = None,
        own: bool = False,
    ) -> None:
        """Prepares the server; from now on nothing that a client sends is missed.

        Args:
          client: connection to Redis.
          session: what answers.
          streams: names of the streams.
          own: this Redis is ours alone; input entries are deleted once they are answered, to bound
            its memory.
        """
        self._client = client
        self._session = session
        self._streams = streams or Streams()
        self._own = own
        names = self._streams
        self._inputs = (names.reset, names.update_params, names.input, names.finalize)
        self._housekept = 0.0
        self._failures: Counter[str] = Counter()
        self._positions = dict(zip(self._inputs, self._newest(), strict=True))

    def run(self, stop: threading.Event, check: Callable[[], None] = lambda: None) -> None:
        """Answers entries until `stop` is set; a Redis that goes away is waited for.

        Args:
          stop: looked at at least twice per second.
          check: called as often; may raise to end the loop.
        """
        pause = 0.0
        while not stop.is_set():
            check()
            try:
                self._housekeeping()
                for entry in self._read():
                    self._answer(entry)
                    if stop.is_set():
                        break
                if pause:
                    _log.info("Redis is back")
                pause = 0.0
            except (redis.exceptions.RedisError, OSError) as error:
                if not pause:
                    _log.error("Redis: %s; trying again until it works", error)
                pause = min(max(2 * pause, 0.1), _LONGEST_PAUSE)
                stop.wait(pause)

    def _newest(self) -> list[EntryId]:
        """The last id that each input stream ever gave; (0, 0) for a stream that is not there."""
        with self._client.pipeline(transaction=False) as pipeline:
            for stream in self._inputs:
                pipeline.xinfo_stream(stream)
            answers = pipeline.execute(raise_on_error=False)
        newest = []
        for answer in answers:
            if isinstance(answer, Exception):
                if "no such key" not in str(answer):
                    raise answer
                newest.append((0, 0))
            else:
                newest.append(_parse_id(_text(_plain(answer)["last-generated-id"])))
        return newest

    def _housekeeping(self) -> None:
        """Tells the settings to clients that come after a FLUSHALL, and sees streams that began
        anew.

        A stream made anew counts from the clock, so its ids are behind our position only if the
        clock was set back or a client made its own ids. They would never be read.
        """
        now = time.monotonic()
        if now - self._housekept < _HOUSEKEEPING_SECONDS:
            return
        self._housekept = now
        if not self._client.xlen(self._streams.args):
            self._send([self._session.args()])
        for stream, newest in zip(self._inputs, self._newest(), strict=True):
            if (0, 0) < newest < self._positions[stream]:
                _log.warning(
                    "stream %s began anew behind our position; reading it from its start", stream
                )
                self._positions[stream] = (0, 0)

    def _read(self) -> list[_Entry]:
        """Waits for entries; gives those whose turn it is, in order."""
        positions: dict[Any, Any] = {
            stream: f"{ms}-{number}" for stream, (ms, number) in self._positions.items()
        }
        answer: Any = self._client.xread(positions, count=_BATCH, block=_BLOCK_MS)
        entries: list[_Entry] = []
        complete_to: tuple[int, int, int] | None = None
        for name, found in answer or []:
            parsed = [
                _Entry(_text(name), _parse_id(_text(id_)), _plain(fields)) for id_, fields in found
            ]
            entries += parsed
            # A full batch: this stream may hold more, so what comes after it elsewhere has to wait.
            if len(found) == _BATCH:
                last = self._turn(parsed[-1])
                complete_to = last if complete_to is None else min(last, complete_to)
        entries = [one for one in entries if complete_to is None or self._turn(one) <= complete_to]
        return sorted(entries, key=self._turn)

    def _turn(self, entry: _Entry) -> tuple[int, int, int]:
        """What entries are ordered by; the number after the millisecond counts per stream."""
        ms, number = entry.id
        return ms, self._inputs.index(entry.stream), number

    def _answer(self, entry: _Entry) -> None:
        context = ""
        if entry.stream == self._streams.finalize:
            context = _text(self._client.get(CONTEXT_KEY) or b"").strip()
        # The position moves first: an entry whose answer cannot be sent must not be answered again
        # and again.
        self._positions[entry.stream] = entry.id
        entry_id = f"{entry.id[0]}-{entry.id[1]}"
        try:
            answers = self._session.handle(entry.stream, entry_id, entry.fields, context)
        except Exception as error:
            # A fault of ours must cost its client one answer and not everybody the server.
            self._failures[type(error).__name__] += 1
            _log.exception(
                "failed on entry %s of %s; failures so far: %s",
                entry_id,
                entry.stream,
                dict(self._failures),
            )
            answers = [self._session.failed(entry.stream, entry_id, error)]
        else:
            for message in answers:
                if message.stream == self._streams.error:
                    _log.warning("refused an entry: %s", _text(message.fields["error"]))
        self._send(answers)
        if self._own:
            self._client.xdel(entry.stream, entry_id)

    def _send(self, messages: list[Message]) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            for message in messages:
                fields: dict[Any, Any] = dict(message.fields)
                pipeline.xadd(message.stream, fields, maxlen=OUTPUT_ENTRIES, approximate=True)
            pipeline.execute()


def _parse_id(text: str) -> EntryId:
    ms, _, number = text.partition("-")
    return int(ms), int(number or 0)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _plain(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """Field names as str; an entry deleted while it was read has none."""
    return {_text(name): value for name, value in (fields or {}).items()}
