"""Opening and closing of sessions: the stream that all clients and servers on a Redis share."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import redis

from lm_server.client.connection import text
from lm_server.errors import UserError
from lm_server.protocol import (
    PROTOCOL_VERSION,
    REGISTRY,
    ProtocolError,
    check_session,
    owner_key,
    request_id,
    session_streams,
    state_key,
)
from lm_server.search.hot_words import parse_hot_words
from lm_server.serving import scripts
from lm_server.serving.conversation import LEASE_MS, newest_ids
from lm_server.serving.session import Session

if TYPE_CHECKING:
    from lm_server.serving.server import Server

_FULL_SECONDS = 0.5
"""A server that is full leaves a request to others for so long before it refuses."""
_KEPT_REQUESTS = 1000
_LAST_WORDS_SECONDS = 60
"""A closed session's streams can be read for so long."""
_NOT_SETTINGS = ("action", "session", "request_id", "idle_seconds", "hot_words")

_log = logging.getLogger(__name__)


class Registrar:
    """Answers requests to open and close sessions, each by one server."""

    def __init__(self, client: redis.Redis, me: str, server: Server) -> None:
        self._client, self._me, self._server = client, me, server
        self._open = client.register_script(scripts.OPEN)
        self._once = client.register_script(scripts.ONCE)
        self._release = client.register_script(scripts.RELEASE)
        ((ms, number),), _ = newest_ids(client, [REGISTRY.requests])
        self.position = f"{ms}-{number}"
        self._later: list[tuple[float, str, Mapping[str, bytes]]] = []

    def take(self, entry_id: str, fields: Mapping[str, bytes]) -> None:
        """Answers a request, or leaves it to another server."""
        self._handle(entry_id, fields)
        # Moved after the work: what failed with Redis is read again, and done once all the same.
        self.position = entry_id

    def housekeeping(self) -> None:
        """Refuses what nobody took, and sees that the stream began anew."""
        now = time.monotonic()
        due = [one for one in self._later if one[0] <= now]
        self._later = [one for one in self._later if one[0] > now]
        for _, entry_id, fields in due:
            self._refuse(
                entry_id,
                fields,
                f"all servers are full (this one serves {self._server.limits.sessions} sessions): "
                "close a session, or start another server",
            )
        ((ms, number),), _ = newest_ids(self._client, [REGISTRY.requests])
        last, _, count = self.position.partition("-")
        if (0, 0) < (ms, number) < (int(last), int(count)):
            self.position = "0-0"
        # What a FLUSHALL took away; a session that somebody closed stays closed.
        named = {name: one for name, one in self._server.conversations.items() if name}
        if named and not self._client.exists(REGISTRY.sessions):
            for name, conversation in named.items():
                description = _describe(conversation.session, conversation.idle_seconds)
                self._client.hset(REGISTRY.sessions, name, description)

    def close(self, session: str, reason: str) -> None:
        """Closes a session of ours on our own account."""
        self._closed(session)
        _log.info("closed session %r: %s", session, reason)
        answer = {"action": "close", "session": session, "done": "1", "reason": reason}
        fields: dict[Any, Any] = dict(answer)
        self._client.xadd(REGISTRY.answers, fields, maxlen=10_000, approximate=True)

    def _handle(self, entry_id: str, fields: Mapping[str, bytes]) -> None:
        action = text(fields.get("action", b""))
        try:
            if action == "open":
                self._open_session(entry_id, fields)
            elif action == "close":
                name = check_session(text(fields.get("session", b"")))
                if name in self._server.conversations:
                    self._close_session(name, entry_id, fields)
                elif not self._client.hexists(REGISTRY.sessions, name):
                    raise ProtocolError(f"there is no open session {name!r}")
                elif not self._client.exists(owner_key(name)):
                    # Its server is gone, and nobody has taken it over yet.
                    self._close_session(name, entry_id, fields)
            else:
                raise ProtocolError(f"the action is {action!r}; needed open or close")
        except (ProtocolError, UserError) as error:
            self._refuse(entry_id, fields, str(error))
        self._client.xtrim(REGISTRY.requests, maxlen=_KEPT_REQUESTS, approximate=True)

    def _open_session(self, entry_id: str, fields: Mapping[str, bytes]) -> None:
        server = self._server
        name = check_session(text(fields.get("session", b"")))
        others = sum(1 for one in server.conversations if one)
        if others >= server.limits.sessions:
            self._later.append((time.monotonic() + _FULL_SECONDS, entry_id, fields))
            return
        session = server.new_session(name)
        idle = self._idle_seconds(fields)
        given = {key: value for key, value in fields.items() if key not in _NOT_SETTINGS}
        words = parse_hot_words(fields["hot_words"]) if "hot_words" in fields else None
        before = session.settings
        session.apply(given, words)
        warnings = session.warnings(before, session.settings, REGISTRY.requests, entry_id, fields)
        description = _describe(session, idle)
        done = self._answer_to(fields) | {
            "done": b"1",
            "idle_seconds": str(idle).encode(),
            "server": self._me.encode(),
            "protocol_version": PROTOCOL_VERSION.encode(),
        }
        refused = self._answer_to(fields) | {
            "error": (
                f"the session {name!r} is open already: choose another id, or close it first"
            ).encode(),
            "entry_id": entry_id.encode(),
        }
        keys = [self._mark(entry_id), REGISTRY.sessions, owner_key(name), state_key(name)]
        keys += [REGISTRY.answers, *vars(session_streams(name)).values()]
        arguments: list[Any] = [self._me, LEASE_MS, name, description]
        for answer in (done, refused):
            arguments.append(len(answer))
            for pair in answer.items():
                arguments += pair
        if self._open(keys=keys, args=arguments) and name not in server.conversations:
            server.opened(session, idle, warnings)
            _log.info("opened session %r", name)

    def _close_session(self, name: str, entry_id: str, fields: Mapping[str, bytes]) -> None:
        self._closed(name)
        self._say_once(entry_id, self._answer_to(fields) | {"done": b"1"})
        _log.info("closed session %r", name)

    def _closed(self, name: str) -> None:
        conversation = self._server.conversations.get(name)
        with self._client.pipeline() as pipeline:
            pipeline.hdel(REGISTRY.sessions, name)
            pipeline.delete(state_key(name))
            for stream in vars(session_streams(name)).values():
                pipeline.expire(stream, _LAST_WORDS_SECONDS)
            pipeline.execute()
        self._release(keys=[owner_key(name)], args=[self._me])
        if conversation is not None:
            # Should it be in the middle of a search, nothing more is sent for it.
            conversation.lost = True
            del self._server.conversations[name]

    def _idle_seconds(self, fields: Mapping[str, bytes]) -> float:
        most = self._server.limits.idle_seconds
        if "idle_seconds" not in fields:
            return most
        try:
            asked = float(fields["idle_seconds"])
        except ValueError as error:
            raise ProtocolError(
                f"idle_seconds is {text(fields['idle_seconds'])!r}; needed a number"
            ) from error
        if not 0 < asked <= most:
            raise ProtocolError(f"idle_seconds is {asked:g}; needed above 0 and at most {most:g}")
        return asked

    def _refuse(self, entry_id: str, fields: Mapping[str, bytes], reason: str) -> None:
        answer = self._answer_to(fields) | {"error": reason.encode(), "entry_id": entry_id.encode()}
        self._say_once(entry_id, answer)

    def _say_once(self, entry_id: str, answer: Mapping[str, bytes]) -> None:
        flat = [part for pair in answer.items() for part in pair]
        self._once(keys=[self._mark(entry_id), REGISTRY.answers], args=[self._me, *flat])

    @staticmethod
    def _answer_to(fields: Mapping[str, bytes]) -> dict[str, bytes]:
        told = {name: fields[name][:100] for name in ("action", "session") if name in fields}
        return told | request_id(fields)

    @staticmethod
    def _mark(entry_id: str) -> str:
        return f"remote_lm_taken:{entry_id}"


def _describe(session: Session, idle_seconds: float | None) -> str:
    return json.dumps({"idle_seconds": idle_seconds, "session": json.loads(session.description())})
