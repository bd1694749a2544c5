"""Keys that hold something else than they should: put out of the way, so that nobody stands still.

Another program on the same Redis, or a person at redis-cli, may make a string of what must be a
stream. Each command on it fails then, for all sessions, as one command reads them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis

from lm_server.client.connection import text
from lm_server.protocol import REGISTRY, owner_key, session_streams, state_key
from lm_server.serving import scripts

ASIDE = "remote_lm_set_aside:"
"""What a key's name begins with after it was put out of the way; a second one of that name has `:2`
at its end."""


def wrong_type(error: BaseException) -> bool:
    """Whether Redis refused a command because a key has another type."""
    return isinstance(error, redis.exceptions.ResponseError) and "WRONGTYPE" in str(error)


def registry_keys() -> dict[str, str]:
    """Type of each key that all sessions share."""
    return {REGISTRY.requests: "stream", REGISTRY.answers: "stream", REGISTRY.sessions: "hash"}


def session_keys(session: str) -> dict[str, str]:
    """Type of each key of a session; the context key aside, which is the client's own."""
    streams = dict.fromkeys(vars(session_streams(session)).values(), "stream")
    return {**streams, state_key(session): "hash", owner_key(session): "string"}


def set_aside(client: redis.Redis, needed: Mapping[str, str]) -> dict[str, str]:
    """Renames the keys whose type is not the one that is needed.

    Args:
      client: connection to Redis.
      needed: type by key.

    Returns:
      By key that was renamed, what was found, what was needed and where it is now.
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
    return renamed
