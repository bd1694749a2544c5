"""The server's loop: reads entries of all sessions, advances the sessions in turns, sends replies.

One blocking XREAD waits on all input streams, so an entry is handled when it arrives. A session's
entries are handled in the order of their ids, which Redis makes from its clock in milliseconds.
Within one millisecond the order is reset, update_params, hot_words, input, finalize.

Sessions are advanced by one entry, or by one slice of long work, at a time. The next one is always
that which has used the least time (start-time fair queueing). So an expensive session delays the
others by one slice at most.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import redis

from lm_server.client.connection import LOST, parse_id, plain, text
from lm_server.errors import UserError
from lm_server.protocol import DEFAULT_SESSION, MAX_CONTEXT, REGISTRY, context_key, owner_key
from lm_server.search.sliced import Sliced
from lm_server.serving.keys.key_types import set_aside, wrong_type
from lm_server.serving.keys.rights import lasting
from lm_server.serving.loop import run_rounds
from lm_server.serving.ownership import BATCH, Limits, OwnedSession, OwnedSessions, Unsent
from lm_server.serving.requests import SessionRequests
from lm_server.serving.session import Entry, Message, Reply, Session
from lm_server.serving.status import Heartbeat, Meter, Report, longest_finish, new_name

_BLOCK_MS = 500
_STOPPING_BLOCK_MS = 50
_HOUSEKEEPING_SECONDS = 0.1
_ROUND_SECONDS = 0.005
"""Time for which sessions are advanced before entries are read again."""

_log = logging.getLogger(__name__)


class EntryDeadlineError(UserError):
    """The handling of an entry took more time than one may."""


class Server:
    """Serves sessions on a Redis until it is stopped."""

    def __init__(
        self,
        client: redis.Redis,
        make_session: Callable[[str], Session],
        limits: Limits | None = None,
        name: str | None = None,
    ) -> None:
        """Adopt the sessions without a server. What clients send from now on is answered.

        Args:
          client: connection to Redis.
          make_session: returns a new session of an id. The default session's is empty.
          limits: how much the server accepts, and how long it waits.
          name: of this server, unique on this Redis.
        """
        self.name = name or new_name("server")
        self.meter = Meter()
        self.limits = limits or Limits()
        self.sessions = OwnedSessions(client, self.name, make_session, self.limits)
        self._client = client
        self.sessions.set_aside()
        self._requests = SessionRequests(client, self.sessions)
        self._asked: deque[Entry] = deque()
        self._request: Sliced[None] | None = None
        self._wake = f"remote_lm_wake:{self.name}"
        self._wake_position = "0-0"
        self._housekept = 0.0
        self._virtual = 0.0
        self._heartbeat = Heartbeat(
            *(client, self.name, "server", self.meter, self._describe, self._renew),
            seconds=self.limits.beat_seconds,
        )
        self.sessions.adopt(at_once=True)
        if DEFAULT_SESSION not in self.sessions:
            _log.warning(
                "the default session is served by %s; standing by for it",
                text(client.get(owner_key(DEFAULT_SESSION)) or b"another"),
            )

    def run(self, stop: threading.Event, check: Callable[[], None] = lambda: None) -> None:
        """Answer entries until `stop` is set. Wait for a Redis that goes away.

        Current sentences may end within `grace_seconds` of the stop. Clients of those that do not
        get an error message.

        Args:
          stop: looked at in every round, at least twice per second.
          check: called in every round. May raise to end the loop.
        """
        deadline: float | None = None

        def ended(failing: bool) -> bool:
            nonlocal deadline
            self._heartbeat.alive()
            if stop.is_set():
                now = time.monotonic()
                deadline = deadline or now + self.limits.grace_seconds
                if failing or now >= deadline or not any(one.busy for one in self.sessions):
                    return True
            check()
            return False

        with self._heartbeat:
            run_rounds(
                lambda: self._round(stopping=deadline is not None),
                ended,
                stop,
                self._set_aside,
            )
            with contextlib.suppress(*LOST):
                self._leave()

    def report(self) -> Report:
        """Return the server's state for operators. Other threads may call this."""
        return self._heartbeat.report()

    def _round(self, stopping: bool) -> None:
        for owned in self.sessions:
            self._flush(owned)
        if not stopping:
            self._housekeeping()
        self._read(stopping)
        self.sessions.acquit_idle()
        if self._asked:
            self._advance_request()
        self._advance_fairly()
        self.sessions.drop_lost()

    # Reading and answering

    def _read(self, stopping: bool) -> None:
        """Read entries. Wait for them where no session has anything to handle."""
        positions: dict[Any, Any] = {self._wake: self._wake_position}
        if not stopping and not self._asked:
            positions[REGISTRY.requests] = self._requests.position
        owners = {}
        for owned in self.sessions:
            if owned.listening and (owned.session.frames or not stopping):
                for stream, (ms, number) in owned.positions.items():
                    positions[stream] = f"{ms}-{number}"
                    owners[stream] = owned
        answer: Any = self._client.xread(positions, count=BATCH, block=self._block_ms(stopping))
        found: dict[OwnedSession, dict[str, list[Entry]]] = {}
        for name, batch in answer or []:
            stream = text(name)
            entries = [Entry(stream, parse_id(id_), plain(fields)) for id_, fields in batch]
            if stream == self._wake:
                self._wake_position = entries[-1].name
            elif stream == REGISTRY.requests:
                self._asked.extend(entries)
            else:
                found.setdefault(owners[stream], {})[stream] = entries
        for owned, batches in found.items():
            owned.take(batches)

    def _block_ms(self, stopping: bool) -> int | None:
        """Return how long to wait for entries. None: not at all."""
        if self._asked or any(owned.ready for owned in self.sessions):
            return None
        block = _STOPPING_BLOCK_MS if stopping else _BLOCK_MS
        first = [owned.unsent[0].reply.pending for owned in self.sessions if owned.unsent]
        deadlines = [pending.deadline for pending in first if pending is not None]
        if deadlines:
            left = 1000 * (min(deadlines) - time.monotonic())
            block = int(max(1, min(block, left + 1)))
        return block

    def _advance_request(self) -> None:
        """Answer the next request, or do one slice of its work."""
        entry = self._asked[0]
        self._request = self._request or self._requests.take(entry)
        try:
            next(self._request)
            return
        except StopIteration:
            pass
        except LOST:
            # They are read again.
            self._asked.clear()
            self._request = None
            raise
        except Exception as error:
            self._keep_dead(entry, error)
            self._requests.refuse(entry, f"the server failed on this request ({error!r})")
        self._request = None
        self._asked.popleft()

    def _advance_fairly(self) -> None:
        """Advance sessions for a moment, each time the one that has used the least time.

        A session that was idle begins where the others are now, so that nobody saves time up.
        """
        until = time.monotonic() + _ROUND_SECONDS
        while ready := [one for one in self.sessions if one.ready and self._may_advance(one)]:
            owned = min(ready, key=lambda one: max(one.used, self._virtual))
            self._virtual = max(owned.used, self._virtual)
            started = time.thread_time()
            self._advance(owned)
            seconds = time.thread_time() - started
            owned.used = self._virtual + seconds
            owned.spent += seconds
            if time.monotonic() >= until:
                break

    def _may_advance(self, owned: OwnedSession) -> bool:
        return not owned.lost and (not owned.suspect or self.sessions.attempt(owned))

    def _advance(self, owned: OwnedSession) -> None:
        """Handle the session's next entry, or one slice more of it."""
        self._heartbeat.alive()
        try:
            if owned.work is None:
                owned.spent = 0.0
                owned.work = self._handle(owned, owned.read.popleft())
            if owned.spent > self.limits.entry_seconds:
                owned.work.throw(
                    EntryDeadlineError(
                        f"the entry took more than {self.limits.entry_seconds:g} s of computing"
                    )
                )
            else:
                next(owned.work)
        except StopIteration:
            owned.work = None
        except BaseException:
            # What is not answered is read again.
            owned.forget()
            raise

    def _handle(self, owned: OwnedSession, entry: Entry) -> Generator[None, None, None]:
        session = owned.session
        started = time.monotonic()
        self._heartbeat.alive(within=longest_finish(session.frames))
        context = ""
        if owned.poison:
            self.sessions.keep_dead(entry, owned.poison)
            reply = Reply([session.dropped(entry, owned.poison)])
            owned.handled(entry, reply, started)
            return self._flush(owned)
        if entry.stream == session.streams.finalize:
            try:
                context = self._context(owned, entry)
            except redis.exceptions.ResponseError as error:
                if not lasting(error):
                    raise
                reason = f"the context cannot be read ({error}): the server's operator can allow it"
                owned.handled(entry, Reply([session.refusal(reason, entry)]), started)
                return self._flush(owned)
        try:
            reply = yield from session.handle(entry, context)
        except EntryDeadlineError as error:
            reply = Reply([session.dropped(entry, str(error))])
        except Exception as error:
            # A fault of ours must cost its client one answer, and not everybody the server.
            self._keep_dead(entry, error)
            reply = Reply([session.failed(entry, error)])
        if reply.pending is not None and not reply.done():
            reply.pending.on_done(self._wake_up)
        owned.handled(entry, reply, started)
        self._flush(owned)

    def _keep_dead(self, entry: Entry, error: Exception) -> None:
        """Log a fault of ours, and keep the entry for an operator to read."""
        self.meter.count(f"failed_{type(error).__name__}")
        _log.error(
            "failed on entry %s of %s; failures so far: %s",
            *(entry.name, entry.stream, self.meter.failures()),
            exc_info=error,
        )
        self.sessions.keep_dead(entry, f"{type(error).__name__}: {error}")

    def _context(self, owned: OwnedSession, entry: Entry) -> str:
        key = context_key(owned.session.name)
        try:
            found: Any = self._client.getrange(key, -MAX_CONTEXT - 1, -1)
            if len(found) > MAX_CONTEXT:
                reason = f"the key {key} is long: only its last {MAX_CONTEXT} bytes are used"
                self.sessions.warn(owned, entry, reason)
            return text(found[-MAX_CONTEXT:]).strip()
        except redis.exceptions.ResponseError as error:
            if not wrong_type(error):
                raise
        # The client's own key is not renamed, and waiting for it would stop all sessions.
        reason = f"the key {key} holds no string; needed SET {key} TEXT: the context is taken empty"
        self.sessions.warn(owned, entry, reason)
        return ""

    def _wake_up(self) -> None:
        """End the wait of `_read`. The rescoring thread calls this."""
        # Without Redis, the loop wakes by itself soon enough.
        with contextlib.suppress(*LOST):
            self._client.xadd(self._wake, {"done": 1}, maxlen=1, approximate=False)

    def _flush(self, owned: OwnedSession) -> None:
        """Send the replies that are done, in the order of their entries."""
        while owned.unsent and not owned.lost and owned.unsent[0].reply.done():
            first = owned.unsent[0]
            try:
                messages = first.reply.messages()
            except Exception as error:
                self._keep_dead(first.entry, error)
                reason = f"the answer cannot be sent ({type(error).__name__}): see the server's log"
                messages = [owned.session.refusal(reason, first.entry)]
                first.reply = Reply(messages)
            self.sessions.send(owned, messages, first)
            owned.unsent.popleft()
            if owned.suspect and not owned.lost:
                self.sessions.acquit(owned)
            for message in messages:
                self._measure(owned, first, message)

    def _measure(self, owned: OwnedSession, unsent: Unsent, message: Message) -> None:
        names = owned.session.streams
        seconds = time.monotonic() - unsent.started
        if message.stream == names.error:
            self.meter.count("errors")
            where = {"session": owned.session.name, "entry": unsent.entry.name}
            error = text(message.fields["error"])
            _log.warning("session %r: %s", owned.session.name, error, extra=where)
        elif message.stream == names.partial:
            self.meter.count("partials")
            self.meter.took("partial", seconds)
        elif message.stream == names.final:
            self.meter.count("sentences")
            self.meter.took("final", seconds)

    # Upkeep

    def _housekeeping(self) -> None:
        now = time.monotonic()
        if now - self._housekept >= _HOUSEKEEPING_SECONDS:
            self._housekept = now
            self.sessions.look_after()
            self._requests.housekeeping()
            self.sessions.adopt()

    def _set_aside(self) -> bool:
        found = self.sessions.set_aside()
        with contextlib.suppress(*LOST):
            found |= bool(set_aside(self._client, {self._wake: "stream"}))
        return found

    def _renew(self) -> None:
        """Renew what this server holds. The heartbeat's thread calls this."""
        self.sessions.renew()
        self._client.expire(self._wake, self.limits.state_seconds)

    def _describe(self) -> dict[str, str]:
        names = [name or "(default)" for name in self.sessions.names]
        return {
            "sessions": str(len(names)),
            "session_names": json.dumps(sorted(names)),
            "waiting_answers": str(sum(len(owned.unsent) for owned in self.sessions)),
        }

    def _leave(self) -> None:
        """Send what can be sent, warn clients whose sentence is cut off, release all sessions."""
        for owned in self.sessions:
            for one in owned.unsent:
                if one.reply.pending is not None:
                    one.reply.pending.deadline = 0.0
            self._flush(owned)
            session = owned.session
            if session.frames:
                reason = (
                    f"the server stops in the middle of a sentence of {session.frames} frames: "
                    "another server goes on with it if one comes within "
                    f"{self.limits.state_seconds} s, else send the sentence again"
                )
                message = session.refusal(reason, Entry(session.streams.input))
                self.sessions.send(owned, [message])
            self.sessions.release(owned)
        self._client.delete(self._wake)
