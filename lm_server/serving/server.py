"""The Redis loop around the sessions: reads entries in the order of their ids, writes the answers.

One blocking XREAD waits on all input streams, so an entry is taken up the moment it arrives. Ids
are the order: Redis gives them from its clock in milliseconds. Entries of one millisecond on
different streams of a session are taken in the order reset, update_params, hot_words, input,
finalize.

Several servers may share a Redis. A session is served by the one that holds its owner key, which
expires soon after its last heartbeat; then another goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import redis

from lm_server.client.connection import LOST, Backoff, EntryId, parse_id, plain, text
from lm_server.protocol import (
    DEFAULT_SESSION,
    REGISTRY,
    WARNING,
    context_key,
    owner_key,
)
from lm_server.serving import scripts
from lm_server.serving.adoption import Adopter
from lm_server.serving.conversation import (
    BATCH,
    LEASE_MS,
    STATE_SECONDS,
    Conversation,
    Entry,
    Sender,
    newest_ids,
    resume,
)
from lm_server.serving.key_types import registry_keys, session_keys, set_aside, wrong_type
from lm_server.serving.limits import Limits
from lm_server.serving.registry import Registrar
from lm_server.serving.session import Message, Pending, Session
from lm_server.serving.status import Alive, Heartbeat, Meter, longest_finish, new_name

_BLOCK_MS = 500
_HOUSEKEEPING_SECONDS = 0.1

_log = logging.getLogger(__name__)


class Server:
    """Serves sessions on a Redis until it is told to stop."""

    def __init__(
        self,
        client: redis.Redis,
        make_session: Callable[[str], Session],
        limits: Limits | None = None,
        name: str | None = None,
    ) -> None:
        """Prepares the server; from now on nothing that a client sends is missed.

        Args:
          client: connection to Redis.
          make_session: a new session of an id; the default session's is empty.
          limits: what it takes on.
          name: of this server; no other on this Redis may have it.
        """
        self.name = name or new_name("server")
        self.meter = Meter()
        self.limits = limits or Limits()
        self._client = client
        self._make = make_session
        self._sender = Sender(client, self.name)
        self._renewal = client.register_script(scripts.RENEW)
        self._release = client.register_script(scripts.RELEASE)
        self.conversations: dict[str, Conversation] = {}
        self._set_aside()
        self._registrar = Registrar(client, self.name, self)
        self._wake = f"remote_lm_wake:{self.name}"
        self._wake_position = "0-0"
        self._adopter = Adopter(client, self.name, self)
        self._housekept = 0.0
        self._turn_of = 0
        self._alive: Alive = lambda within=0.0: None
        self._adopter.adopt(at_once=True)
        if DEFAULT_SESSION not in self.conversations:
            _log.warning(
                "the default session is served by %s; standing by for it",
                text(client.get(owner_key(DEFAULT_SESSION)) or b"another"),
            )

    def run(self, stop: threading.Event, check: Callable[[], None] = lambda: None) -> None:
        """Answers entries until `stop` is set; a Redis that goes away is waited for.

        Sentences under way may end then, for `grace_seconds`; clients of those that do not are
        told.

        Args:
          stop: looked at at least twice per second.
          check: called as often; may raise to end the loop.
        """
        backoff = Backoff(stop)
        with Heartbeat(
            self._client, self.name, "server", self.meter, self._describe, self._renew
        ) as heartbeat:
            self._alive = heartbeat.alive
            deadline = None
            while True:
                self._alive()
                if stop.is_set():
                    now = time.monotonic()
                    deadline = deadline or now + self.limits.grace_seconds
                    busy = any(one.in_sentence for one in self.conversations.values())
                    if not busy or now >= deadline:
                        break
                check()
                try:
                    self._round(stopping=deadline is not None)
                    if backoff.failing:
                        _log.info("Redis is back")
                    backoff.worked()
                except LOST as error:
                    if wrong_type(error) and self._set_aside():
                        continue
                    if stop.is_set():
                        break
                    if not backoff.failing:
                        _log.error("Redis: %s; trying again until it works", error)
                    backoff.failed()
            with contextlib.suppress(*LOST):
                self._leave()

    def _round(self, stopping: bool) -> None:
        for conversation in list(self.conversations.values()):
            self._flush(conversation)
        if not stopping:
            self._housekeeping()
        self._take_turns(self._read(stopping))
        for name, conversation in list(self.conversations.items()):
            if conversation.lost:
                _log.warning("session %r is served by another server now; leaving it", name)
                del self.conversations[name]

    # Reading and answering

    def _take_turns(self, entries: Sequence[tuple[Conversation, Entry]]) -> None:
        for conversation, entry in entries:
            # Lost in the middle of what was read: the rest is the other server's. And what was
            # read here may have been read and answered during another session's long search.
            if not conversation.lost and entry.id > conversation.positions[entry.stream]:
                self._answer(conversation, entry)
                self._flush(conversation)

    def _meanwhile(self) -> None:
        """Serves the other sessions in the middle of one's long search."""
        self._alive()
        # The search must not fail with Redis; the loop meets the same error and waits.
        with contextlib.suppress(*LOST):
            for conversation in list(self.conversations.values()):
                self._flush(conversation)
            self._take_turns(self._read(wait=False))

    def _read(self, stopping: bool = False, wait: bool = True) -> list[tuple[Conversation, Entry]]:
        """Waits for entries; gives those whose turn it is, in order within each session."""
        heard = [
            one
            for one in self.conversations.values()
            if one.listening and not one.busy and (one.session.frames or not stopping)
        ]
        positions: dict[Any, Any] = {self._wake: self._wake_position}
        if not stopping:
            positions[REGISTRY.requests] = self._registrar.position
        owners = {}
        for conversation in heard:
            for stream, (ms, number) in conversation.positions.items():
                positions[stream] = f"{ms}-{number}"
                owners[stream] = conversation
        block = 50 if stopping else _BLOCK_MS
        deadlines = [one.unsent[0].deadline for one in self.conversations.values() if one.unsent]
        if deadlines:
            block = max(1, min(block, int(1000 * (min(deadlines) - time.monotonic())) + 1))
        answer: Any = self._client.xread(positions, count=BATCH, block=block if wait else None)
        found: dict[str, dict[str, list[Entry]]] = {}
        for name, batch in answer or []:
            stream = text(name)
            if stream == self._wake:
                self._wake_position = text(batch[-1][0])
            elif stream == REGISTRY.requests:
                for id_, fields in batch:
                    self._registrar.take(text(id_), plain(fields))
            else:
                found.setdefault(owners[stream].session.name, {})[stream] = [
                    Entry(stream, parse_id(id_), plain(fields)) for id_, fields in batch
                ]
        taken = []
        for name, batches in found.items():
            # A session that was closed by what the registry stream held is not served any more.
            if name in self.conversations:
                one = self.conversations[name]
                taken += [(one, entry) for entry in one.in_order(batches)]
        return taken

    def _answer(self, conversation: Conversation, entry: Entry) -> None:
        session = conversation.session
        started = time.monotonic()
        self._alive(within=longest_finish(session.frames))
        context = ""
        if entry.stream == session.streams.finalize:
            context = self._context(conversation, entry)
        answers: list[Message] | Pending
        conversation.busy = True
        try:
            answers = session.handle(entry.stream, entry.name, entry.fields, context)
        except Exception as error:
            # A fault of ours must cost its client one answer and not everybody the server.
            self.meter.count(f"failed_{type(error).__name__}")
            _log.exception(
                "failed on entry %s of %s; failures so far: %s",
                entry.name,
                entry.stream,
                self.meter.failures(),
            )
            answers = [session.failed(entry.stream, entry.name, entry.fields, error)]
        finally:
            conversation.busy = False
        if isinstance(answers, Pending):
            answers.future.add_done_callback(self._wake_up)
        conversation.took(entry, answers, self.limits.rescore_seconds, started)

    def _context(self, conversation: Conversation, entry: Entry) -> str:
        session = conversation.session
        key = context_key(session.name)
        try:
            return text(self._client.get(key) or b"").strip()
        except redis.exceptions.ResponseError as error:
            if not wrong_type(error):
                raise
        # A client's own mistake: waiting for it to go away would stop all sessions.
        reason = f"the key {key} holds no string; needed SET {key} TEXT: the context is taken empty"
        warning = session.refusal(reason, entry.stream, entry.name, entry.fields, WARNING)
        self._sender.send(conversation, [warning])
        return ""

    def _set_aside(self) -> bool:
        """Puts keys of another type out of the way and tells whose they are; whether there were."""
        found = False
        with contextlib.suppress(*LOST):
            for reason in set_aside(self._client, registry_keys()).values():
                _log.error("%s", reason)
                found = True
            # Open sessions whose server is gone are taken over, and must not stop us then.
            open_: Any = self._client.hkeys(REGISTRY.sessions)
            names = {DEFAULT_SESSION, *self.conversations, *map(text, open_)}
            for name in sorted(names):
                for key, reason in set_aside(self._client, session_keys(name)).items():
                    _log.error("session %r: %s", name, reason)
                    found = True
                    if name in self.conversations:
                        conversation = self.conversations[name]
                        told = conversation.session.refusal(reason, key, "0-0", {}, WARNING)
                        self._sender.send(conversation, [told])
        return found

    def _wake_up(self, _: Future[Any]) -> None:
        """Ends the wait of `_read`; called by the rescoring's thread."""
        # Without Redis, the loop wakes by itself soon enough.
        with contextlib.suppress(*LOST):
            self._client.xadd(self._wake, {"done": 1}, maxlen=1, approximate=False)

    def _flush(self, conversation: Conversation) -> None:
        """Sends the answers that are ready, in order."""
        while conversation.unsent and not conversation.lost:
            one = conversation.unsent[0]
            answers = one.answers
            if isinstance(answers, Pending):
                if answers.future.done():
                    answers = answers.messages()
                elif time.monotonic() >= one.deadline:
                    answers.future.cancel()
                    answers = answers.without_rescoring(
                        f"the large language model took longer than "
                        f"{self.limits.rescore_seconds:g} s"
                    )
                else:
                    return
                # Kept, should the sending fail: a promise must not be redeemed twice.
                one.answers = answers
            self._sender.send(conversation, answers, one)
            conversation.unsent.popleft()
            self._measure(conversation, one, answers)

    def _measure(self, conversation: Conversation, one: Any, answers: list[Message]) -> None:
        names = conversation.session.streams
        seconds = time.monotonic() - one.started
        for message in answers:
            if message.stream == names.error:
                self.meter.count("errors")
                _log.warning(
                    "session %r: %s",
                    conversation.session.name,
                    text(message.fields["error"]),
                    extra={"session": conversation.session.name, "entry": one.entry.name},
                )
            elif message.stream == names.partial:
                self.meter.count("partials")
                self.meter.took("partial", seconds)
            elif message.stream == names.final:
                self.meter.count("sentences")
                self.meter.took("final", seconds)

    # Sessions: taking, keeping, leaving

    def _housekeeping(self) -> None:
        """Tells the settings to clients that come after a FLUSHALL, sees streams that began anew,
        ends idle sessions, and takes over those whose server is gone."""
        now = time.monotonic()
        if now - self._housekept < _HOUSEKEEPING_SECONDS:
            return
        self._housekept = now
        # All streams of all sessions every time would be a load; they take turns.
        others = [name for name in self.conversations if name != DEFAULT_SESSION]
        looked_at = [DEFAULT_SESSION] if DEFAULT_SESSION in self.conversations else []
        if others:
            self._turn_of = (self._turn_of + 1) % len(others)
            looked_at.append(others[self._turn_of])
        for name in looked_at:
            self._look_after(self.conversations[name])
        self._registrar.housekeeping()
        for conversation in list(self.conversations.values()):
            idle = conversation.idle_seconds
            if idle is not None and now - conversation.active > idle and not conversation.unsent:
                self._registrar.close(conversation.session.name, f"idle for {idle:g} s")
        self._adopter.housekeeping()

    def _look_after(self, conversation: Conversation) -> None:
        session = conversation.session
        if not self._client.xlen(session.streams.args):
            self._sender.send(conversation, [session.args()])
        newest, lengths = newest_ids(self._client, conversation.inputs)
        for stream, last, length in zip(conversation.inputs, newest, lengths, strict=True):
            # A stream made anew counts from the clock, so its ids are behind our position only if
            # the clock was set back or a client made its own ids. They would never be read.
            if (0, 0) < last < conversation.positions[stream]:
                _log.warning(
                    "stream %s began anew behind our position; reading it from its start", stream
                )
                conversation.positions[stream] = (0, 0)
            if length > self.limits.backlog:
                self._drop_backlog(conversation, stream, length, last)

    def _drop_backlog(
        self, conversation: Conversation, stream: str, length: int, last: EntryId
    ) -> None:
        session = conversation.session
        self._client.xtrim(stream, maxlen=0, approximate=False)
        conversation.positions[stream] = last
        reason = OverflowError(
            f"{length} entries waited; at most {self.limits.backlog} may: they are deleted"
        )
        refusal = session.failed(stream, f"{last[0]}-{last[1]}", {}, reason)
        self._sender.send(conversation, [refusal])

    def begin(self, name: str, description: bytes | None) -> None:
        """Goes on with a session where the server before us was; see `Adopter`."""
        conversation = resume(self._client, self.new_session(name), description)
        self.conversations[name] = conversation
        if not conversation.whole:
            session = conversation.session
            gone = RuntimeError("another server ended, and entries of the sentence are deleted")
            refusal = session.failed(session.streams.input, "0-0", {}, gone)
            self._sender.send(conversation, [refusal])

    def opened(
        self, session: Session, idle_seconds: float, warnings: Sequence[Message] = ()
    ) -> None:
        """A session that a client asked for is ours; `warnings`: what it shall be told."""
        conversation = Conversation(session, idle_seconds, {})
        self.conversations[session.name] = conversation
        self._sender.send(conversation, [session.args(), *warnings])

    def new_session(self, name: str) -> Session:
        """A session with this server's settings."""
        session = self._make(name)
        session.between = self._meanwhile
        return session

    def _renew(self) -> None:
        """Keeps our sessions ours; called by the heartbeat's thread."""
        for conversation in list(self.conversations.values()):
            arguments: list[Any] = [self.name, LEASE_MS, STATE_SECONDS]
            if not self._renewal(keys=conversation.keys, args=arguments):
                conversation.lost = True
        self._client.expire(self._wake, STATE_SECONDS)

    def _describe(self) -> dict[str, str]:
        names = sorted(name or "(default)" for name in self.conversations)
        unsent = sum(len(one.unsent) for one in list(self.conversations.values()))
        return {
            "sessions": str(len(names)),
            "session_names": json.dumps(names),
            "waiting_answers": str(unsent),
        }

    def _leave(self) -> None:
        """Tells clients whose sentence is cut off, and gives all sessions back."""
        for conversation in self.conversations.values():
            for one in conversation.unsent:
                one.deadline = 0.0
            self._flush(conversation)
            session = conversation.session
            if session.frames:
                text_ = (
                    f"the server stops in the middle of a sentence of {session.frames} frames: "
                    f"another server goes on with it if one comes within {STATE_SECONDS} s, else "
                    "send the sentence again"
                )
                refusal = session.refusal(text_, session.streams.input, "0-0", {})
                self._sender.send(conversation, [refusal])
            self._release(keys=conversation.keys[:1], args=[self.name])
        self._client.delete(self._wake)
