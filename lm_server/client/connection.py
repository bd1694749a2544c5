"""Connections to Redis: by URL, with a wait at the start, and what every reader of it needs."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lm_server.errors import UserError

LONGEST_PAUSE = 5.0
"""Seconds between attempts at most, while Redis does not answer."""
LOST = (redis.exceptions.RedisError, OSError)
"""What any command raises when Redis cannot be reached or cannot answer at the moment."""

EntryId = tuple[int, int]


class RedisUnavailableError(UserError, RuntimeError):
    """Redis cannot be reached or used; says where it was looked for and what it answered."""


def shown_url(url: str) -> str:
    """The URL without its password, whichever of the two ways it is given in."""
    shown = re.sub(r"([?&]password=)[^&]*", r"\1***", url)
    # Up to the last @, so that an @ within the password does not show the rest of it.
    return re.sub(r"(://[^:@/]*:).*@", r"\1***@", shown)


def connect(url: str, wait_seconds: float, stop: threading.Event) -> redis.Redis:
    """A client of the Redis at `url` (redis://, rediss:// or unix://, with user and password if
    need be); threads may share it.

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
        except redis.exceptions.BusyLoadingError as error:
            _wait(url, wait_seconds, deadline, stop, error)
        except redis.exceptions.ResponseError as error:
            raise RedisUnavailableError(
                f"Redis at {shown_url(url)} refuses us ({error}): check user and rights"
            ) from error
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
            _wait(url, wait_seconds, deadline, stop, error)
        stop.wait(pause)
        pause = min(2 * pause, 1.0)


def _wait(
    url: str, wait_seconds: float, deadline: float, stop: threading.Event, error: Exception
) -> None:
    if not stop.is_set() and time.monotonic() < deadline:
        return
    why = str(error)
    # A certificate that is not trusted will not be in a minute either, but says so at the end.
    hint = (
        "; the server's certificate is not trusted: add ?ssl_ca_certs=FILE to the URL"
        if "CERTIFICATE_VERIFY_FAILED" in why
        else ""
    )
    raise RedisUnavailableError(
        f"no Redis answers at {shown_url(url)} after {wait_seconds:g} s ({why}{hint}): "
        "start one, or give its URL with --redis (serve and worker: or use --embedded-redis)"
    ) from error


class Backoff:
    """Pauses that double while Redis does not answer."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._pause = 0.0

    @property
    def failing(self) -> bool:
        """Whether the last attempt failed."""
        return self._pause > 0

    def failed(self) -> None:
        """Waits; longer each time."""
        self._pause = min(max(2 * self._pause, 0.1), LONGEST_PAUSE)
        self._stop.wait(self._pause)

    def worked(self) -> None:
        """Begins anew."""
        self._pause = 0.0


def parse_id(value: Any) -> EntryId:
    """An entry's id -> (milliseconds, number)."""
    ms, _, number = text(value).partition("-")
    return int(ms), int(number or 0)


def text(value: Any) -> str:
    """What Redis sends, as str."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def plain(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """Field names as str; an entry deleted while it was read has none."""
    return {text(name): value for name, value in (fields or {}).items()}
