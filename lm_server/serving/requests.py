"""Clients' requests to open and close sessions, on the stream that all servers of a Redis share."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import redis

from lm_server.client.connection import text
from lm_server.errors import UserError, shortened
from lm_server.protocol import (
    PROTOCOL_VERSION,
    REGISTRY,
    ProtocolError,
    check_session,
    echoed,
    owner_key,
    session_streams,
    state_key,
)
from lm_server.search.hot_words import guess_ahead, parse_hot_words
from lm_server.search.sliced import Sliced
from lm_server.serving.keys import scripts
from lm_server.serving.keys.rights import lasting
from lm_server.serving.ownership import OwnedSession, OwnedSessions, newest_ids
from lm_server.serving.session import Entry

_FULL_SECONDS = 0.5
"""A full server leaves a request to others for so long before it refuses."""
_KEPT_REQUESTS = 1000
_NOT_SETTINGS = ("action", "session", "request_id", "client", "idle_seconds", "hot_words")

_log = logging.getLogger(__name__)


class SessionRequests:
    """The requests' stream, read by every server. Each request is answered by one of them.

    Attributes:
      position: id of the last request that was handled.
    """

    def __init__(self, client: redis.Redis, sessions: OwnedSessions) -> None:
        """Begin with the next request. Open and close sessions of the table `sessions`."""
        self._client, self._sessions = client, sessions
        self._open_script = client.register_script(scripts.OPEN)
        self._once = client.register_script(scripts.ONCE)
        ((ms, number),), _ = newest_ids(client, [REGISTRY.requests])
        self.position = f"{ms}-{number}"
        self._later: list[tuple[float, Entry]] = []

    def take(self, entry: Entry) -> Sliced[None]:
        """Answer a request, or leave it to another server. Yield between slices of the work."""
        action = text(entry.fields.get("action", b""))
        try:
            if action not in ("open", "close"):
                raise ProtocolError(f"the action is {action!r}; needed open or close")
            name = check_session(text(entry.fields.get("session", b"")))
            if action == "open":
                yield from self._open(name, entry)
            else:
                self._close(name, entry)
        except (ProtocolError, UserError) as error:
            self._answer_once(entry, _refusal(entry, str(error)))
        except redis.exceptions.ResponseError as error:
            if not lasting(error):
                raise
            # The rights for this session's keys are missing, not those for all.
            reason = f"Redis refuses the server a command ({error}): choose another id"
            self._answer_once(entry, _refusal(entry, reason))
        self._client.xtrim(REGISTRY.requests, maxlen=_KEPT_REQUESTS, approximate=True)
        # Moved after the work: what failed with Redis is read again, and done once all the same.
        self.position = entry.name

    def refuse(self, entry: Entry, reason: str) -> None:
        """Answer a request that failed here, and move behind it."""
        self._answer_once(entry, _refusal(entry, reason))
        self.position = entry.name

    def housekeeping(self) -> None:
        """Refuse what no server accepted, and notice a stream that began anew."""
        now = time.monotonic()
        due = [entry for when, entry in self._later if when <= now]
        self._later = [one for one in self._later if one[0] > now]
        for entry in due:
            reason = (
                f"all servers are full (this one serves {self._sessions.limits.sessions} "
                "sessions): close a session, or start another server"
            )
            self._answer_once(entry, _refusal(entry, reason))
        (newest,), _ = newest_ids(self._client, [REGISTRY.requests])
        last, _, count = self.position.partition("-")
        if (0, 0) < newest < (int(last), int(count)):
            self.position = "0-0"

    def _open(self, name: str, entry: Entry) -> Sliced[None]:
        sessions, fields = self._sessions, entry.fields
        if sessions.full:
            self._later.append((time.monotonic() + _FULL_SECONDS, entry))
            return
        session = sessions.make_session(name)
        before, idle = session.settings, self._idle_seconds(fields)
        given = {key: value for key, value in fields.items() if key not in _NOT_SETTINGS}
        words = parse_hot_words(fields["hot_words"]) if "hot_words" in fields else None
        yield from guess_ahead(words or {})
        session.apply(given, words)
        done = _answer(entry) | {
            "done": b"1",
            "idle_seconds": str(idle).encode(),
            "server": sessions.me.encode(),
            "protocol_version": PROTOCOL_VERSION.encode(),
        }
        reason = f"the session {name!r} is open already: choose another id, or close it first"
        keys = [_mark(entry), REGISTRY.sessions, owner_key(name), state_key(name)]
        keys += [REGISTRY.answers, *vars(session_streams(name)).values()]
        description = OwnedSession(session, idle).description()
        arguments: list[Any] = [sessions.me, sessions.lease_ms, name, description]
        for answer in (done, _refusal(entry, reason)):
            arguments += [len(answer), *scripts.flat(answer)]
        if self._open_script(keys=keys, args=arguments) and name not in sessions:
            asked = Entry(entry.stream, entry.id, {**given, **echoed(fields)})
            sessions.add(session, idle, session.warnings(before, asked))
            _log.info("opened session %r", name)

    def _close(self, name: str, entry: Entry) -> None:
        if name not in self._sessions:
            if not self._client.hexists(REGISTRY.sessions, name):
                raise ProtocolError(f"there is no open session {name!r}")
            if self._client.exists(owner_key(name)):
                return  # Its server closes it.
        self._sessions.close(name)
        self._answer_once(entry, _answer(entry) | {"done": b"1"})

    def _idle_seconds(self, fields: Mapping[str, bytes]) -> float:
        most = self._sessions.limits.idle_seconds
        if "idle_seconds" not in fields:
            return most
        try:
            asked = float(fields["idle_seconds"])
        except ValueError as error:
            raise ProtocolError(
                f"idle_seconds is {text(fields['idle_seconds'])[:40]!r}; needed a number"
            ) from error
        if not 0 < asked <= most:
            raise ProtocolError(f"idle_seconds is {asked:g}; needed above 0 and at most {most:g}")
        return asked

    def _answer_once(self, entry: Entry, answer: Mapping[str, bytes]) -> None:
        arguments = [self._sessions.me, *scripts.flat(answer)]
        self._once(keys=[_mark(entry), REGISTRY.answers], args=arguments)


def _answer(entry: Entry) -> dict[str, bytes]:
    """Return the fields that every answer to a request has."""
    fields = entry.fields
    repeated = {name: fields[name][:100] for name in ("action", "session") if name in fields}
    return repeated | echoed(fields)


def _refusal(entry: Entry, reason: str) -> dict[str, bytes]:
    return _answer(entry) | {"error": shortened(reason).encode(), "entry_id": entry.name.encode()}


def _mark(entry: Entry) -> str:
    """Return the key that the server which answers a request writes."""
    return f"remote_lm_taken:{entry.name}"
