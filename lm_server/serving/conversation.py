"""What a server keeps of one session: where it is in the streams, and answers not sent yet."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from lm_server.client.connection import EntryId, parse_id, plain, text
from lm_server.protocol import ProtocolError, decode_logits, owner_key, state_key
from lm_server.serving import scripts
from lm_server.serving.session import Message, Pending, Session

LEASE_MS = 4000
"""A session is ours for so long after the last sign of life."""
STATE_SECONDS = 60
"""For so long after a server's end another can go on where it was."""
OUTPUT_ENTRIES = 10_000
"""Entries that an output stream keeps, about; older ones go."""
BATCH = 16
"""Entries taken from one stream at a time."""
_MAX_UNSENT = 200
_KEPT_OF_SENTENCE = 20_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """An entry of an input stream."""

    stream: str
    id: EntryId
    fields: Mapping[str, bytes]

    @property
    def name(self) -> str:
        """The id as Redis writes it."""
        return f"{self.id[0]}-{self.id[1]}"


@dataclass
class Unsent:
    """Answers to an entry: ready, or promised until `deadline` (monotonic seconds)."""

    entry: Entry
    answers: list[Message] | Pending
    started: float
    deadline: float
    state: dict[str, str]
    done_with: list[tuple[str, str]] = field(default_factory=list)


class Conversation:
    """A session that this server serves."""

    def __init__(
        self, session: Session, idle_seconds: float | None, positions: Mapping[str, EntryId]
    ) -> None:
        """Begins after `positions`; `idle_seconds` None: the session never ends by idleness."""
        self.session = session
        self.idle_seconds = idle_seconds
        names = session.streams
        self.inputs = (
            *(names.reset, names.update_params, names.hot_words),
            *(names.input, names.finalize),
        )
        self.positions = {stream: positions.get(stream, (0, 0)) for stream in self.inputs}
        self.unsent: deque[Unsent] = deque()
        self.active = time.monotonic()
        self.whole = True
        """Whether the sentence under way has all its frames; not after a takeover too late."""
        self.lost = self.busy = False
        self._of_sentence: list[tuple[str, str]] = []
        self._first: str | None = None

    @property
    def keys(self) -> list[str]:
        """The session's owner and state keys."""
        return [owner_key(self.session.name), state_key(self.session.name)]

    @property
    def listening(self) -> bool:
        """Whether more entries can be taken; not while too many answers wait to be sent."""
        return len(self.unsent) < _MAX_UNSENT

    @property
    def in_sentence(self) -> bool:
        """Whether a sentence is under way or its answer is not sent."""
        return self.session.frames > 0 or bool(self.unsent)

    def turn(self, entry: Entry) -> tuple[int, int, int]:
        """What entries are ordered by; the number after the millisecond counts per stream."""
        ms, number = entry.id
        return ms, self.inputs.index(entry.stream), number

    def in_order(self, found: Mapping[str, Sequence[Entry]]) -> list[Entry]:
        """The entries whose turn it is, of all that a read with count `BATCH` gave."""
        entries: list[Entry] = []
        complete_to: tuple[int, int, int] | None = None
        for batch in found.values():
            entries += batch
            # A full batch: this stream may hold more, so what comes after it elsewhere has to wait.
            if len(batch) == BATCH:
                last = self.turn(batch[-1])
                complete_to = last if complete_to is None else min(last, complete_to)
        entries = [one for one in entries if complete_to is None or self.turn(one) <= complete_to]
        return sorted(entries, key=self.turn)

    def took(
        self, entry: Entry, answers: list[Message] | Pending, patience: float, started: float
    ) -> None:
        """Notes that an entry, taken up at `started` (monotonic seconds), is handled and what
        answers it; a rescoring has `patience` seconds from now.

        Entries of the sentence under way stay in Redis until it ends, so that another server could
        hear them again.
        """
        now = time.monotonic()
        names = self.session.streams
        self.positions[entry.stream] = entry.id
        self.active = now
        if entry.stream == names.input and self._first is None:
            self._first = entry.name
        done_with = []
        if entry.stream in (names.reset, names.finalize) or not self.session.frames:
            done_with = [*self._of_sentence, (entry.stream, entry.name)]
            self._of_sentence, self._first = [], None
        elif entry.stream == names.input:
            self._of_sentence.append((entry.stream, entry.name))
            if len(self._of_sentence) > _KEPT_OF_SENTENCE:
                done_with = [self._of_sentence.pop(0)]
        else:
            done_with = [(entry.stream, entry.name)]
        sentence = {"first": self._first, "frames": self.session.frames}
        state = {"sentence": json.dumps(sentence), "session": self.session.description()}
        self.unsent.append(Unsent(entry, answers, started, now + patience, state, done_with))

    def replay(self, client: redis.Redis, sentence: Mapping[str, Any]) -> bool:
        """Hears the sentence under way again; whether all of it was still there."""
        first, frames = sentence.get("first"), sentence.get("frames", 0)
        if not frames:
            return True
        stream = self.session.streams.input
        last = "{}-{}".format(*self.positions[stream])
        entries: Any = client.xrange(stream, first or "-", last)
        for id_, fields in entries:
            try:
                self.session.search_frames(decode_logits(plain(fields).get("logits", b"")))
            except ProtocolError:
                continue  # It was refused before, too.
            self._of_sentence.append((stream, text(id_)))
        self._first = first
        if self.session.frames == frames:
            return True
        _log.warning(
            "session %r: of its sentence of %d frames only %d are left in Redis",
            self.session.name,
            frames,
            self.session.frames,
        )
        return False


def resume(client: redis.Redis, session: Session, description: bytes | None) -> Conversation:
    """A conversation that begins where the session's last server was, if that was not long ago.

    Args:
      client: connection to Redis.
      session: a new one, with this server's settings.
      description: of a session that a client opened, from `REGISTRY.sessions`; None: the default
        session.

    Returns:
      The conversation. Frames of a sentence under way are searched again; where they are not all
      there any more, the search knows fewer than `sentence` of its state says, see `Conversation.
      replay`.
    """
    kept: Any = client.hgetall(state_key(session.name))
    state = plain(kept)
    idle = None
    if description is not None:
        opened = json.loads(description)
        idle = float(opened["idle_seconds"])
        _restore(session, json.dumps(opened["session"]))
    if "session" in state:
        _restore(session, state["session"])
    conversation = Conversation(session, idle, {})
    for stream in conversation.inputs:
        if stream in state:
            conversation.positions[stream] = parse_id(state[stream])
    if not state and description is None:
        # Nobody has served it lately: what was sent to nobody is not answered.
        newest, _ = newest_ids(client, conversation.inputs)
        conversation.positions.update(zip(conversation.inputs, newest, strict=True))
    if state:
        _log.info("session %r: going on where another server ended", session.name)
        sentence = json.loads(state.get("sentence", "{}"))
        conversation.whole = conversation.replay(client, sentence)
    return conversation


def _restore(session: Session, description: str | bytes) -> None:
    try:
        session.restore(description)
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("session %r: its settings cannot be used here: %s", session.name, error)


class Sender:
    """Sends a conversation's answers, each once."""

    def __init__(self, client: redis.Redis, me: str) -> None:
        self._client, self._me = client, me
        self._answer = client.register_script(scripts.ANSWER)

    def send(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        unsent: Unsent | None = None,
    ) -> None:
        """Sends messages, as the answer to an entry or on their own.

        Marks the conversation as lost if another server has it. After an error of Redis it can be
        called again: what was done before is not done twice.
        """
        stream, entry_id, state, done_with = "", "", {}, []
        if unsent is not None:
            stream, entry_id = unsent.entry.stream, unsent.entry.name
            state, done_with = unsent.state, unsent.done_with
        arguments: list[Any] = [
            *(self._me, LEASE_MS, stream, entry_id, STATE_SECONDS, OUTPUT_ENTRIES),
            len(state),
        ]
        for name, value in state.items():
            arguments += [name, value]
        arguments.append(len(messages))
        for message in messages:
            arguments += [message.stream, len(message.fields)]
            for name, content in message.fields.items():
                arguments += [name, content]
        for pair in done_with:
            arguments += pair
        if not self._answer(keys=conversation.keys, args=arguments):
            conversation.lost = True


def newest_ids(client: redis.Redis, streams: Sequence[str]) -> tuple[list[EntryId], list[int]]:
    """The last id that each stream ever gave, and its length; (0, 0) and 0 where there is none."""
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
