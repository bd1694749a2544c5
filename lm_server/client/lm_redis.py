"""The connection to Redis that everything which asks the language model's server uses."""

from __future__ import annotations

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lm_server.client.answers import LanguageModelError, mask_password


def redis_client(url: str) -> Any:
    """A client for this URL; nothing is sent yet.

    Raises:
      LanguageModelError: the URL is no Redis URL.
    """
    try:
        # RESP2 explicitly: redis-py's default answers XREAD in another shape. No silent retries: a
        # lost message must not be sent twice, since the server would decode it twice.
        return redis.Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=5.0,
            socket_timeout=30.0,
        )
    except ValueError as error:
        raise LanguageModelError(
            f"{mask_password(url)!r} is no Redis URL ({error}); needed "
            "redis://[:password@]host:port/database, rediss://... or unix:///path"
        ) from error
