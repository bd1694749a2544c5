"""The sessions that this process owns on a Redis: leases, positions, answers, orphans.

A session is owned by the process that holds its owner key. The key expires soon after that
process's last heartbeat. Then another process adopts the session and goes on from its saved state.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from lm_server.client.connection import LOST, EntryId, parse_id, plain, text
from lm_server.errors import UserError
from lm_server.protocol import (
    DEFAULT_SESSION,
    REGISTRY,
    WARNING,
    ProtocolError,
    attempts_key,
    is_session,
    owner_key,
    session_streams,
    state_key,
)
from lm_server.serving.keys import scripts
from lm_server.serving.keys.dead_letters import KEPT, dead_letter
from lm_server.serving.keys.key_types import (
    registry_keys,
    session_keys,
    set_aside,
    set_field_aside,
    wrong_type,
)
from lm_server.serving.keys.saved_state import (
    SavedState,
    SavedStateError,
    read_description,
    read_state,
)
from lm_server.serving.session import Entry, Message, Reply, Session, client_of, logits_of

BATCH = 16
"""Entries read from one stream at a time."""
_OUTPUT_ENTRIES = 10_000
"""Entries that an output stream keeps, about."""
_OUTPUT_BYTES = 16_000_000
"""Bytes that an output stream keeps, about. At least half as many."""
_MAX_UNSENT = 200
_KEPT_OF_SENTENCE = 20_000
_LONGEST_LEASE_MS = 30_000
"""No server asks for a longer lease. A foreign owner key with a longer one is cut to ours."""
_ATTEMPTS = 3
"""Servers that may take a session over and end at its next entry. The next one drops it."""
_ATTEMPT_SECONDS = 3600
_LAST_WORDS_SECONDS = 60
"""A closed session's streams can be read for so long."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much a server accepts, and how long it waits.

    Attributes:
      sessions: open sessions besides the default one.
      idle_seconds: a session without entries for so long is closed, unless it asked for less.
      backlog: entries of one stream that may wait. More end the sentence and are dropped.
      grace_seconds: at the stop, time for current sentences to end.
      lease_seconds: a session is owned for so long after its server's last heartbeat.
      state_seconds: a session's state is kept for so long after its server's last heartbeat.
      refused_seconds: a session that could not be adopted is tried again after so long.
      entry_seconds: computing time that one entry may take. More ends its sentence.
    """

    sessions: int = 64
    idle_seconds: float = 600.0
    backlog: int = 20_000
    grace_seconds: float = 3.0
    lease_seconds: float = 4.0
    state_seconds: int = 60
    refused_seconds: float = 30.0
    entry_seconds: float = 60.0

    @property
    def beat_seconds(self) -> float:
        """Time between two heartbeats, each of which renews the leases."""
        return min(1.0, self.lease_seconds / 4)

    @property
    def look_seconds(self) -> float:
        """Time between two searches for orphans."""
        return self.lease_seconds / 8

    @property
    def absent_seconds(self) -> float:
        """Time for which an owner key must be absent before its session is adopted.

        After a FLUSHALL the owner writes it again with the next heartbeat.
        """
        return self.lease_seconds * 5 / 8


@dataclass
class Unsent:
    """The reply to an entry, with what is written to Redis together with it.

    Attributes:
      entry: the entry.
      reply: its messages.
      started: when the entry was taken up (monotonic seconds).
      state: fields of the session's saved state.
      done_with: stream and id of the entries that nobody needs any more.
    """

    entry: Entry
    reply: Reply
    started: float
    state: dict[str, str]
    done_with: list[tuple[str, str]]


class OwnedSession:
    """A session, its positions in the input streams, and its replies that are not sent yet.

    Attributes:
      positions: the last entry handled, by input stream.
      read: entries that were read and not handled yet.
      work: the handling of one entry, a slice at every `next`. None between entries.
      unsent: replies in the order of their entries.
      active: when an entry was handled last (monotonic seconds).
      used: where the session stands in the queue of those that want computing time (seconds).
      spent: computing time that `work` took so far (seconds).
      lost: whether another process owns the session now.
      suspect: whether the session's next work may be what ended the server before.
      attempted: whether that work was begun here and counted.
      poison: why the next entry is dropped. Empty: it is handled.
    """

    def __init__(self, session: Session, idle_seconds: float | None = None) -> None:
        """Begin at the start of all streams. `idle_seconds` None: never close it as idle."""
        self.session = session
        self.idle_seconds = idle_seconds
        names = session.streams
        # The order of entries with the same millisecond.
        self.inputs = (
            *(names.reset, names.update_params, names.hot_words),
            *(names.input, names.finalize),
        )
        self.positions: dict[str, EntryId] = dict.fromkeys(self.inputs, (0, 0))
        self.read: deque[Entry] = deque()
        self.work: Generator[None, None, None] | None = None
        self.unsent: deque[Unsent] = deque()
        self.active = time.monotonic()
        self.lost = self.suspect = self.attempted = False
        self.poison = ""
        self.used = 0.0
        self.spent = 0.0
        self._of_sentence: list[tuple[str, str]] = []
        self._first: str | None = None

    @property
    def keys(self) -> list[str]:
        """The session's owner and state keys."""
        return [owner_key(self.session.name), state_key(self.session.name)]

    @property
    def ready(self) -> bool:
        """Whether there is something to handle."""
        return self.work is not None or bool(self.read)

    @property
    def listening(self) -> bool:
        """Whether more entries may be read."""
        return not self.ready and len(self.unsent) < _MAX_UNSENT

    @property
    def busy(self) -> bool:
        """Whether a sentence has begun, or anything waits to be handled or sent."""
        return self.ready or bool(self.unsent) or self.session.frames > 0

    def take(self, batches: Mapping[str, Sequence[Entry]]) -> None:
        """Queue the entries whose turn it is, of all that a read with count `BATCH` returned."""
        entries = sorted((one for batch in batches.values() for one in batch), key=self._turn)
        # A full batch: its stream may hold more, and later entries of the others must wait.
        full = [self._turn(batch[-1]) for batch in batches.values() if len(batch) == BATCH]
        self.read.extend(one for one in entries if not full or self._turn(one) <= min(full))

    def forget(self) -> None:
        """Drop what is read or half handled: it is read again from `positions`."""
        self.work = None
        self.read.clear()

    def handled(self, entry: Entry, reply: Reply, started: float) -> None:
        """Move behind an entry that was taken up at `started`, and queue its reply.

        The entries of the current sentence stay in Redis until it ends, so that another process can
        search them again.
        """
        names = self.session.streams
        self.positions[entry.stream] = entry.id
        self.active = time.monotonic()
        if entry.stream == names.input and self._first is None:
            self._first = entry.name
        done_with = []
        if not self.session.frames:
            done_with = [*self._of_sentence, (entry.stream, entry.name)]
            self._of_sentence, self._first = [], None
        elif entry.stream == names.input:
            self._of_sentence.append((entry.stream, entry.name))
            if len(self._of_sentence) > _KEPT_OF_SENTENCE:
                done_with = [self._of_sentence.pop(0)]
        else:
            done_with = [(entry.stream, entry.name)]
        session = self.session
        sentence = {"first": self._first, "frames": session.frames, "lost": session.lost}
        state = {"sentence": json.dumps(sentence), "session": session.description()}
        self.unsent.append(Unsent(entry, reply, started, state, done_with))

    def replay(
        self, first: str | None, entries: Sequence[tuple[Any, Any]]
    ) -> Generator[None, None, None]:
        """Search the entries of a sentence again. Yield between slices.

        Args:
          first: id of the sentence's first entry.
          entries: id and fields of the input stream's entries.
        """
        self._first = first
        for id_, fields in entries:
            try:
                if client_of(plain(fields)) == self.session.client:
                    yield from self.session.search_frames(logits_of(plain(fields)))
            except ProtocolError:
                continue  # The first server refused it, too.
            self._of_sentence.append((self.session.streams.input, text(id_)))
            yield

    def description(self) -> str:
        """Return the session's value in the hash of open sessions."""
        session = json.loads(self.session.description())
        return json.dumps({"idle_seconds": self.idle_seconds, "session": session})

    def _turn(self, entry: Entry) -> tuple[int, int, int]:
        # The number after the millisecond counts per stream.
        ms, number = entry.id
        return ms, self.inputs.index(entry.stream), number


class OwnedSessions:
    """The table of sessions that this process owns. Threads may renew their leases meanwhile."""

    def __init__(
        self,
        client: redis.Redis,
        me: str,
        make_session: Callable[[str], Session],
        limits: Limits | None = None,
    ) -> None:
        """Begin without a session.

        Args:
          client: connection to Redis.
          me: the process's name, which owner keys hold.
          make_session: returns a new session of an id.
          limits: how much is accepted, and how long leases last.
        """
        self.me, self.limits, self.make_session = me, limits or Limits(), make_session
        self.lease_ms = int(1000 * self.limits.lease_seconds)
        self._client = client
        self._answer = client.register_script(scripts.ANSWER)
        self._renewal = client.register_script(scripts.RENEW)
        self._release = client.register_script(scripts.RELEASE)
        self._owned: dict[str, OwnedSession] = {}
        self._absent: dict[str, float] = {}
        self._looked = 0.0
        self._turn_of = 0
        self._sent: dict[str, tuple[int, int]] = {}

    def __iter__(self) -> Iterator[OwnedSession]:
        """Iterate over those owned now, whatever happens to the table meanwhile."""
        return iter(list(self._owned.values()))

    def __contains__(self, name: str) -> bool:
        """Return whether a session is owned."""
        return name in self._owned

    @property
    def names(self) -> list[str]:
        """Ids of the owned sessions. The default one's is empty."""
        return sorted(self._owned)

    @property
    def full(self) -> bool:
        """Whether no more sessions are accepted besides the default one."""
        return sum(1 for name in self._owned if name) >= self.limits.sessions

    def send(
        self, owned: OwnedSession, messages: Sequence[Message], unsent: Unsent | None = None
    ) -> None:
        """Send messages on their own, or as the reply to an entry together with its state.

        A reply is sent once, however often this is called. The session is marked as lost if another
        process owns it.

        Raises:
          RedisError: Redis did not answer. Call this again.
        """
        stream, entry_id, state, done_with = "", "", {}, []
        if unsent is not None:
            stream, entry_id = unsent.entry.stream, unsent.entry.name
            state, done_with = unsent.state, unsent.done_with
        arguments: list[Any] = [self.me, self.lease_ms, stream, entry_id]
        arguments += [self.limits.state_seconds, _OUTPUT_ENTRIES, len(state), *scripts.flat(state)]
        arguments.append(len(messages))
        for message in messages:
            arguments += [message.stream, len(message.fields), *scripts.flat(message.fields)]
        for entry in done_with:
            arguments += entry
        if not self._answer(keys=owned.keys, args=arguments):
            owned.lost = True
        for message in messages:
            self._bound(message)

    def _bound(self, message: Message) -> None:
        """Trim an output stream each time that half of `_OUTPUT_BYTES` were sent to it.

        What was sent before these is deleted. So the bytes need not be known of each entry.
        """
        entries, size = self._sent.pop(message.stream, (0, 0))
        entries, size = entries + 1, size + sum(map(len, message.fields.values()))
        if size <= _OUTPUT_BYTES // 2:
            self._sent[message.stream] = entries, size
        else:
            self._client.xtrim(message.stream, maxlen=entries, approximate=False)

    def warn(self, owned: OwnedSession, entry: Entry, reason: str) -> None:
        """Send a warning about an entry."""
        self.send(owned, [owned.session.refusal(reason, entry, WARNING)])

    def keep_dead(self, entry: Entry, reason: str) -> None:
        """Keep an entry for an operator to read."""
        letter: dict[Any, Any] = {
            **dead_letter(self.me, entry.stream, entry.name, reason, entry.fields)
        }
        # The client's answer must not wait for it.
        with contextlib.suppress(*LOST):
            self._client.xadd(REGISTRY.dead, letter, maxlen=KEPT, approximate=False)

    def add(self, session: Session, idle_seconds: float, warnings: Sequence[Message] = ()) -> None:
        """Add a session that was opened for this process, and send its settings and warnings."""
        owned = self._owned[session.name] = OwnedSession(session, idle_seconds)
        self.send(owned, [session.args(), *warnings])

    def close(self, name: str, reason: str | None = None) -> None:
        """Close a session of this process or an orphan. Announce it to its client if there is a
        `reason` that the client does not know."""
        with self._client.pipeline() as pipeline:
            pipeline.hdel(REGISTRY.sessions, name)
            pipeline.delete(state_key(name), attempts_key(name))
            for stream in vars(session_streams(name)).values():
                pipeline.expire(stream, _LAST_WORDS_SECONDS)
            pipeline.execute()
        self._release(keys=[owner_key(name)], args=[self.me])
        self._owned.pop(name, None)
        for stream in vars(session_streams(name)).values():
            self._sent.pop(stream, None)
        _log.info("closed session %r%s", name, f": {reason}" if reason else "")
        if reason:
            answer: dict[Any, Any] = {"action": "close", "session": name, "done": 1}
            answer["reason"] = reason
            self._client.xadd(REGISTRY.answers, answer, maxlen=10_000, approximate=True)

    def renew(self) -> None:
        """Renew all leases. A session of which another process holds the lease is lost."""
        for owned in self:
            lease: list[Any] = [self.me, self.lease_ms, self.limits.state_seconds]
            try:
                # Only ever set here: the loop may find out at the same time that it is lost.
                if not owned.lost and not self._renewal(keys=owned.keys, args=lease):
                    owned.lost = True
            except redis.exceptions.ResponseError as error:
                if not wrong_type(error):
                    raise
                # The other sessions need their leases.
                set_aside(self._client, session_keys(owned.session.name))

    def drop_lost(self) -> None:
        """Remove the sessions that another process owns now."""
        for owned in self:
            if owned.lost:
                name = owned.session.name
                _log.warning("session %r is served by another server now; leaving it", name)
                self._owned.pop(name, None)

    def release(self, owned: OwnedSession) -> None:
        """Release a session, so that another process can adopt it at once."""
        self.acquit(owned)
        self._release(keys=owned.keys[:1], args=[self.me])

    # Sessions whose next entry may have ended the server before

    def attempt(self, owned: OwnedSession) -> bool:
        """Count that a suspect session's work begins. False: another suspect's comes first.

        One at a time, since the count must not blame the company of what ends the process.
        """
        if any(one is not owned and one.attempted for one in self):
            return False
        if not owned.attempted:
            key, count = attempts_key(owned.session.name), self._attempts(owned.session.name) + 1
            self._client.set(key, count, ex=_ATTEMPT_SECONDS)
            owned.attempted = True
        return True

    def acquit(self, owned: OwnedSession, forever: bool = True) -> None:
        """Forget the attempts at a session's work, which has ended well."""
        if owned.attempted:
            self._client.delete(attempts_key(owned.session.name))
        owned.attempted, owned.poison = False, ""
        owned.suspect = owned.suspect and not forever

    def acquit_idle(self) -> None:
        """Forget the attempts at sentences that were searched again and have no entry yet."""
        for owned in self:
            if owned.suspect and not (owned.ready or owned.unsent):
                self.acquit(owned, forever=False)

    def _attempts(self, name: str) -> int:
        found = text(self._client.get(attempts_key(name)) or b"0")
        return int(found) if found.isdecimal() and len(found) < _ATTEMPTS + 6 else 0

    # Orphans

    def adopt(self, at_once: bool = False) -> None:
        """Adopt sessions without an owner: the default one and open ones.

        With `at_once`, an owner that is absent now is not waited for.
        """
        now = time.monotonic()
        if not at_once and now - self._looked < self.limits.look_seconds:
            return
        self._looked = now
        open_: Any = self._client.hgetall(REGISTRY.sessions)
        descriptions = {}
        for field, value in open_.items():
            if is_session(text(field)):
                descriptions[text(field)] = value
            else:
                set_field_aside(self._client, REGISTRY.sessions, field)
        for name in [DEFAULT_SESSION, *descriptions]:
            if name in self._owned or self._is_owned(name):
                self._absent.pop(name, None)
                continue
            if name != DEFAULT_SESSION and self.full:
                continue
            since = self._absent.setdefault(name, now)
            if at_once or now - since >= self.limits.absent_seconds:
                self._absent.pop(name, None)
                if self._client.set(owner_key(name), self.me, px=self.lease_ms, nx=True):
                    self._adopt(name, descriptions.get(name), at_once)

    def _is_owned(self, name: str) -> bool:
        """Return whether there is an owner key. Let one that nobody renews expire."""
        left: Any = self._client.pttl(owner_key(name))
        if left == -1 or left > _LONGEST_LEASE_MS:
            # A server that lives renews it.
            self._client.pexpire(owner_key(name), self.lease_ms)
            _log.error(
                "the key %s would not expire for long, so no server wrote it: it expires in %g s "
                "now; look for the program that wrote it",
                *(owner_key(name), self.limits.lease_seconds),
            )
        return bool(left != -2)

    def _adopt(self, name: str, description: bytes | None, at_once: bool) -> None:
        try:
            session = self.make_session(name)
        except UserError as error:
            self._release(keys=[owner_key(name)], args=[self.me])
            if at_once and name == DEFAULT_SESSION:
                raise  # What this process was started with cannot be used.
            # This session must not cost the others their server.
            self._absent[name] = time.monotonic() + self.limits.refused_seconds
            _log.error("session %r cannot be taken over: %s; left to other servers", name, error)
            return
        owned = OwnedSession(session)
        if description is not None:
            self._restore_opened(owned, description)
        state = self._saved_state(owned)
        # What is new to this server has ended none.
        owned.suspect = state is not None or description is not None
        attempts = self._attempts(name)
        if owned.suspect and attempts >= _ATTEMPTS:
            owned.poison = (
                f"{attempts} servers that took this session over ended at this entry, or while "
                "they searched its sentence again; it is not tried again, and is kept in the "
                f"stream {REGISTRY.dead} for the operator"
            )
            self._client.delete(attempts_key(name))
        if state is None:
            self._begin(owned, description is not None)
        else:
            _log.info("session %r: going on where another server ended", name)
            if state.session is not None:
                self._restore(owned, state.session)
            owned.positions.update(state.positions)
            session.lost = state.lost
            if state.frames:
                stream = session.streams.input
                last = "{}-{}".format(*owned.positions[stream])
                entries: Any = self._client.xrange(stream, state.first or "-", last)
                if owned.poison:
                    for id_, fields in entries[-1:]:
                        self.keep_dead(Entry(stream, parse_id(id_), plain(fields)), owned.poison)
                    self._lose(owned, owned.poison)
                    left = {"first": None, "frames": 0, "lost": session.lost}
                    self._client.hset(owned.keys[1], "sentence", json.dumps(left))
                else:
                    owned.work = self._replay(owned, state.first, entries, state.frames)
        self._owned[name] = owned

    def _restore_opened(self, owned: OwnedSession, description: bytes) -> None:
        """Apply what the hash of open sessions holds. Repair what cannot be read."""
        try:
            owned.idle_seconds, opened = read_description(description)
        except SavedStateError as error:
            owned.idle_seconds = self.limits.idle_seconds
            name = owned.session.name
            self._client.hset(REGISTRY.sessions, name, owned.description())
            reason = (
                f"the hash {REGISTRY.sessions} held for the session {name!r} what no server wrote "
                f"({error}): settings and hot words with which it was opened are lost; send them "
                "again"
            )
            _log.error("%s", reason)
            self.warn(owned, Entry(REGISTRY.sessions), reason)
        else:
            self._restore(owned, opened)

    def _restore(self, owned: OwnedSession, description: str) -> None:
        try:
            owned.session.restore(description)
        except Exception as error:
            # Another version or another program wrote it. It must not end this server.
            reason = (
                "settings and hot words of this session cannot be used here, send them again "
                f"({type(error).__name__}: {str(error)[:500]})"
            )
            _log.warning("session %r: %s", owned.session.name, reason)
            self.warn(owned, Entry(state_key(owned.session.name)), reason)

    def _saved_state(self, owned: OwnedSession) -> SavedState | None:
        """Return what another server left of a session. None: nothing that can be used."""
        key = owned.keys[1]
        kept: Any = self._client.hgetall(key)
        if not kept:
            return None
        try:
            return read_state(plain(kept), owned.inputs)
        except SavedStateError as error:
            self._client.delete(key)
            self._lose(owned, f"the key {key} held what no server wrote ({error}); it is deleted")
        return None

    def _begin(self, owned: OwnedSession, opened: bool) -> None:
        """Choose where to read a session that no server has served lately."""
        names = owned.session.streams
        newest, _ = newest_ids(self._client, (*owned.inputs, names.partial))
        last = dict(zip((*owned.inputs, names.partial), newest, strict=True))
        # All entries of a session that was opened are read. Those of the current sentence are there
        # unless some were answered. What was sent to nobody on the default streams is not answered.
        begun = last[names.partial if opened else names.input]
        if not opened:
            owned.positions.update(zip(owned.inputs, newest, strict=False))
        if not owned.session.lost and begun > max(last[names.reset], last[names.finalize]):
            kept = self.limits.state_seconds
            self._lose(owned, f"no server was there for it, or none for more than {kept} s")

    def _lose(self, owned: OwnedSession, reason: str) -> None:
        """Have the rest of the current sentence answered by errors, the first of them now."""
        message = owned.session.lose(Entry(owned.session.streams.input), reason)
        _log.error("session %r: %s", owned.session.name, text(message.fields["error"]))
        self.send(owned, [message])

    def _replay(
        self, owned: OwnedSession, first: str | None, entries: Any, frames: int
    ) -> Generator[None, None, None]:
        session = owned.session
        try:
            yield from owned.replay(first, entries)
        except Exception:
            # A fault of ours; it must not go from server to server with the session.
            _log.exception("session %r: its sentence cannot be searched again", session.name)
            frames = -1
        if session.frames != frames:
            found = f"only {session.frames} of its {frames} frames are still there"
            self._lose(owned, f"another server ended, and {found if frames >= 0 else 'it failed'}")

    # Upkeep

    def look_after(self) -> None:
        """Repair what others did to streams, and close idle sessions.

        The settings are sent to clients that come after a FLUSHALL. Streams that began anew are
        read from their start, and too long ones are emptied. The default session and one of the
        others are looked at in each call, because all of them would be a load.
        """
        others = [name for name in self._owned if name != DEFAULT_SESSION]
        chosen = [DEFAULT_SESSION] if DEFAULT_SESSION in self._owned else []
        if others:
            self._turn_of = (self._turn_of + 1) % len(others)
            chosen.append(others[self._turn_of])
        for name in chosen:
            self._look_after_one(self._owned[name])
        now = time.monotonic()
        for owned in self:
            idle, waits = owned.idle_seconds, owned.ready or owned.unsent
            if idle is not None and now - owned.active > idle and not waits:
                self.close(owned.session.name, f"idle for {idle:g} s")
        # What a FLUSHALL deleted; a session that somebody closed stays closed.
        named = [one for one in self if one.session.name]
        if named and not self._client.exists(REGISTRY.sessions):
            for owned in named:
                self._client.hset(REGISTRY.sessions, owned.session.name, owned.description())

    def _look_after_one(self, owned: OwnedSession) -> None:
        session = owned.session
        if not self._client.xlen(session.streams.args):
            self.send(owned, [session.args()])
        newest, lengths = newest_ids(self._client, owned.inputs)
        for stream, last, length in zip(owned.inputs, newest, lengths, strict=True):
            # A stream made anew counts from the clock, so its ids are behind our position only if
            # the clock was set back or a client made its own ids. They would never be read.
            if (0, 0) < last < owned.positions[stream]:
                _log.warning(
                    "stream %s began anew behind our position; reading it from its start", stream
                )
                owned.positions[stream] = (0, 0)
            if length > self.limits.backlog:
                names = session.streams
                of_sentences = (names.reset, names.input, names.finalize)
                for one in of_sentences if stream in of_sentences else (stream,):
                    self._client.xtrim(one, maxlen=0, approximate=False)
                    owned.positions[one] = newest[owned.inputs.index(one)]
                owned.forget()
                reason = (
                    f"{length} entries waited; at most {self.limits.backlog} may: they are "
                    "deleted, and all entries of sentences with them"
                )
                self.send(owned, [session.lose(Entry(stream, last), reason)])
                return

    def set_aside(self) -> bool:
        """Rename keys of a wrong type and warn their sessions. Return whether there were any."""
        reasons = {}
        with contextlib.suppress(*LOST):
            reasons = set_aside(self._client, registry_keys())
            # Orphans too: they are adopted, and must not stop this process then.
            open_: Any = self._client.hkeys(REGISTRY.sessions)
            valid = {name for name in map(text, open_) if is_session(name)}
            for name in sorted({DEFAULT_SESSION, *self._owned, *valid}):
                found = set_aside(self._client, session_keys(name))
                reasons |= found
                if name in self._owned:
                    for key, reason in found.items():
                        self.warn(self._owned[name], Entry(key), reason)
        return bool(reasons)


def newest_ids(client: redis.Redis, streams: Sequence[str]) -> tuple[list[EntryId], list[int]]:
    """Return each stream's last id ever and its length, (0, 0) and 0 where there is no stream."""
    with client.pipeline(transaction=False) as pipeline:
        for stream in streams:
            pipeline.xinfo_stream(stream)
        answers = pipeline.execute(raise_on_error=False)
    newest, lengths = [], []
    for answer in answers:
        if isinstance(answer, Exception):
            if "no such key" not in str(answer):
                raise answer
            newest.append((0, 0))
            lengths.append(0)
        else:
            info = plain(answer)
            newest.append(parse_id(info["last-generated-id"]))
            lengths.append(int(info["length"]))
    return newest, lengths
