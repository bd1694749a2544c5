"""Taking over sessions without a server: the default one, and open ones whose server is gone."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import redis

from lm_server.client.connection import text
from lm_server.errors import UserError
from lm_server.protocol import DEFAULT_SESSION, REGISTRY, owner_key
from lm_server.serving import scripts
from lm_server.serving.conversation import LEASE_MS

if TYPE_CHECKING:
    from lm_server.serving.server import Server

_LOOKING_SECONDS = 0.5
_ABSENT_SECONDS = 2.5
"""An owner key must be away for so long before another server takes its session: after a FLUSHALL
the owner writes it again within a second."""
_REFUSED_SECONDS = 30.0
"""A session that could not be taken over is tried again after so long."""

_log = logging.getLogger(__name__)


class Adopter:
    """Looks for sessions without an owner and gives them to its server."""

    def __init__(self, client: redis.Redis, me: str, server: Server) -> None:
        self._client, self._me, self._server = client, me, server
        self._release = client.register_script(scripts.RELEASE)
        self._absent: dict[str, float] = {}
        self._looked = 0.0

    def housekeeping(self) -> None:
        """Looks, unless it did so a moment ago."""
        if time.monotonic() - self._looked >= _LOOKING_SECONDS:
            self.adopt()

    def adopt(self, at_once: bool = False) -> None:
        """Takes sessions without an owner; `at_once`: without waiting for it to come back."""
        self._looked = now = time.monotonic()
        open_: Any = self._client.hgetall(REGISTRY.sessions)
        descriptions = {text(name): value for name, value in open_.items()}
        served = self._server.conversations
        for name in [DEFAULT_SESSION, *descriptions]:
            if name in served:
                self._absent.pop(name, None)
                continue
            if name != DEFAULT_SESSION and len(served) > self._server.limits.sessions:
                continue
            if self._client.exists(owner_key(name)):
                self._absent.pop(name, None)
                continue
            since = self._absent.setdefault(name, now)
            if at_once or now - since >= _ABSENT_SECONDS:
                self._absent.pop(name, None)
                if self._client.set(owner_key(name), self._me, px=LEASE_MS, nx=True):
                    self._begin(name, descriptions.get(name), at_once)

    def _begin(self, name: str, description: bytes | None, at_once: bool) -> None:
        try:
            self._server.begin(name, description)
        except UserError as error:
            self._release(keys=[owner_key(name)], args=[self._me])
            if at_once and name == DEFAULT_SESSION:
                raise  # What this server was started with cannot be used.
            # One session more must not cost the others their server.
            self._absent[name] = time.monotonic() + _REFUSED_SECONDS
            _log.error("session %r cannot be taken over: %s; left to other servers", name, error)
