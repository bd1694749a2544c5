"""Keys of a wrong type: renamed, so that they block nobody.

Another program on the same Redis, or a person at redis-cli, may write a string where a stream
belongs. Every command on that key fails then, for all sessions, because one command reads them all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import redis

from lm_server.client.connection import text
from lm_server.protocol import REGISTRY, attempts_key, owner_key, session_streams, state_key
from lm_server.serving.keys import scripts

ASIDE = "remote_lm_set_aside:"
"""Prefix of a renamed key. A second one of the same name gets the suffix `:2`."""

_log = logging.getLogger(__name__)


def wrong_type(error: BaseException) -> bool:
    """Return whether Redis refused a command because of what a key holds."""
    return isinstance(error, redis.exceptions.ResponseError) and any(
        words in str(error) for words in ("WRONGTYPE", "exhausted the last possible ID")
    )


def registry_keys() -> dict[str, str]:
    """Return the type of each key that all sessions share."""
    shared = (REGISTRY.requests, REGISTRY.answers, REGISTRY.dead)
    return {**dict.fromkeys(shared, "stream"), REGISTRY.sessions: "hash"}


def session_keys(session: str) -> dict[str, str]:
    """Return the type of each key of a session, without the context key, which clients own."""
    streams = dict.fromkeys(vars(session_streams(session)).values(), "stream")
    strings = dict.fromkeys((owner_key(session), attempts_key(session)), "string")
    return {**streams, state_key(session): "hash", **strings}


def set_aside(client: redis.Redis, needed: Mapping[str, str]) -> dict[str, str]:
    """Rename and log the keys whose type is not the needed one.

    Args:
      client: connection to Redis.
      needed: type by key.

    Returns:
      By renamed key: what it held, what was needed, and where it is now.
    """
    script = client.register_script(scripts.SET_ASIDE)
    renamed = {}
    for key, type_ in needed.items():
        answer: Any = script(keys=[key, ASIDE + key], args=[type_])
        if answer:
            found, place = map(text, answer)
            renamed[key] = (
                f"the key {key} held a {found}; needed a {type_}: it is renamed to {place}; "
                "look for the program that wrote it"
            )
            _log.error("%s", renamed[key])
    return renamed


def set_field_aside(client: redis.Redis, key: str, field: bytes) -> None:
    """Move a field of a hash that no server wrote to another hash, and log it."""
    place = f"{ASIDE}fields:{key}"
    set_aside(client, {place: "hash"})
    value: Any = client.hget(key, field)
    if value is not None:
        client.hset(place, field, value)
        client.hdel(key, field)
    _log.error(
        "the hash %s had the field %r, which no server wrote: it is moved to the hash %s; look for "
        "the program that wrote it",
        *(key, field[:80], place),
    )
