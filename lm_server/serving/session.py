"""One client's session as a state machine: entries come in, messages go out. No Redis, no clock.

The messages are those of the published server (reset, input, finalize, update_params and their
answers) and hot words. A message that cannot be used is answered on the error stream and leaves the
state unchanged. A long search is done in slices, so that its caller can serve others in between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lm_server.client.connection import EntryId, text
from lm_server.errors import shortened
from lm_server.hypothesis import Answer, Hypothesis
from lm_server.process import version
from lm_server.protocol import (
    CLIENT,
    HOLD_MS,
    MAX_MESSAGE_FRAMES,
    MAX_REQUEST_ID,
    MAX_SCORING,
    PROTOCOL_VERSION,
    RELEASE,
    WARNING,
    ProtocolError,
    decode_logits,
    echoed,
    encode_scoring,
    session_streams,
)
from lm_server.rescoring.answering import Answering, PendingAnswer
from lm_server.search.hot_words import HotWord, HotWordError, guess_ahead, parse_hot_words
from lm_server.search.interface import NO_HOT_WORDS, BackendError, SearchModel
from lm_server.search.sliced import Sliced
from lm_server.serving.parameters import (
    NO_CEILINGS,
    NOT_NEEDED,
    OURS,
    changed_settings,
    idle_settings,
    named,
)
from lm_server.settings import Settings, SettingsError

STEP_FRAMES = 100
_AGAIN = "send reset, then the sentence again"
"""Frames of one slice of a search that keeps at most 100 hypotheses. A wider one has fewer."""
MAX_KEPT = 5_000_000
"""Frames of a sentence times `max_active`, of which each costs the search some 100 bytes."""


@dataclass(frozen=True)
class Entry:
    """An entry of an input stream."""

    stream: str
    id: EntryId = (0, 0)
    fields: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The id as Redis writes it."""
        return f"{self.id[0]}-{self.id[1]}"


@dataclass(frozen=True)
class Message:
    """An entry for an output stream."""

    stream: str
    fields: Mapping[str, bytes]


class Reply:
    """The messages that answer one entry: ready, or waiting for a `pending` answer."""

    def __init__(
        self,
        messages: list[Message],
        pending: PendingAnswer | None = None,
        compose: Callable[[Answer], list[Message]] = lambda answer: [],
    ) -> None:
        """Hold `messages`, or what `compose` makes of the pending answer."""
        self.pending = pending
        self._messages, self._compose = messages, compose

    def done(self) -> bool:
        """Return whether the messages are there without waiting."""
        return self.pending is None or self.pending.done()

    def messages(self) -> list[Message]:
        """Return the messages, the same at every call."""
        if self.pending is not None:
            self._messages, self.pending = self._compose(self.pending.result()), None
        return self._messages


def logits_of(fields: Mapping[str, bytes]) -> np.ndarray:
    """Return the logits of an input entry or of a job, float32 [frames, 41].

    Raises:
      ProtocolError: there are none, or they cannot be used.
    """
    if "logits" not in fields:
        raise ProtocolError(
            f"the entry has the fields {shortened(str(sorted(fields)), 200)}; needed `logits`: "
            "float32 [frames, 41] as raw bytes"
        )
    return decode_logits(fields["logits"])


def client_of(fields: Mapping[str, bytes]) -> str:
    """Return the name of the client that sent an entry. Empty if it did not name itself."""
    return text(fields.get(CLIENT, b"")[:MAX_REQUEST_ID])


def slices(logits: np.ndarray, max_active: int) -> Iterator[np.ndarray]:
    """Yield logits [frames, 41] in slices of some 10 ms of search each, at least one slice."""
    frames = min(STEP_FRAMES, max(1, 100 * STEP_FRAMES // max_active))
    for start in range(0, max(len(logits), 1), frames):
        yield logits[start : start + frames]


def check_length(frames: int, settings: Settings, max_frames: int = MAX_MESSAGE_FRAMES) -> None:
    """Check that a sentence is short enough for its settings.

    Raises:
      ProtocolError: it is longer than `max_frames`, or than a search of this width has memory for.
    """
    if frames > max_frames:
        raise ProtocolError(
            f"the sentence would have {frames} frames; at most {max_frames} are possible: send "
            "finalize or reset between sentences"
        )
    if frames * settings.max_active > MAX_KEPT:
        raise ProtocolError(
            f"the sentence would have {frames} frames; with max_active {settings.max_active} at "
            f"most {MAX_KEPT // settings.max_active} are possible: lower max_active, or send "
            "finalize or reset between sentences"
        )


class Session:
    """State of one client: settings, hot words, and the search of the current sentence."""

    def __init__(
        self,
        model: SearchModel,
        settings: Settings,
        name: str = "",
        answering: Answering | None = None,
        hot_words: Mapping[str, HotWord] = NO_HOT_WORDS,
        max_frames: int = MAX_MESSAGE_FRAMES,
        ceilings: Mapping[str, float] = NO_CEILINGS,
    ) -> None:
        """Begin without a sentence.

        Args:
          model: the model folder that is searched.
          settings: the settings until the client changes them.
          name: the session's id. Empty is the default session with the published streams.
          answering: makes answers of hypotheses. None: at once, with the n-gram model's scores.
          hot_words: words that the search favours until the client changes them.
          max_frames: frames of one sentence, at most MAX_MESSAGE_FRAMES.
          ceilings: by setting, the greatest value that a client may choose.

        The attribute `lost` is why the beginning of the current sentence is lost, `client` the name
        of the client that holds the session. Both are empty without.
        """
        self._ceilings = ceilings
        self.max_frames = max_frames
        self.name = name
        self.streams = session_streams(name)
        self.hot_words = dict(hot_words)
        self._model = model
        self._settings = settings
        self._answering = answering or Answering()
        self._search = model.search(settings, self.hot_words)
        self._asked: set[str] = set()
        self._asked_words = False
        self._description: str | None = None
        self.lost = self.client = ""
        self._heard: int | None = None

    @property
    def settings(self) -> Settings:
        """The settings of the next sentence."""
        return self._settings

    @property
    def frames(self) -> int:
        """Frames of the current sentence so far."""
        return self._search.frames

    def handle(self, entry: Entry, context: str = "") -> Sliced[Reply]:
        """Handle one entry. Yield after every slice of long work and return the reply.

        No other entry may be handled before the generator has ended. One that is dropped leaves a
        part of its frames in the search: call `failed` then.

        Args:
          entry: the entry, on one of the session's input streams.
          context: the context string at this moment. A final answer repeats it.
        """
        names = self.streams
        foreign = self._foreign(entry)
        if foreign:
            refusal = self.refusal(foreign, entry)
            # The client that holds the session reads it too, and must know that it is not meant.
            of = {CLIENT: client_of(entry.fields).encode()}
            return Reply([Message(refusal.stream, {**refusal.fields, **of})])
        try:
            self._refuse_rest(entry)
            if entry.stream == names.reset:
                self._search.begin(self._settings)
                if RELEASE in entry.fields:
                    self._hold("", None)
                return Reply([self._done(names.done_resetting, entry)])
            if entry.stream == names.input:
                return Reply([(yield from self._step(entry))])
            if entry.stream == names.finalize:
                return (yield from self._finish(entry, context))
            if entry.stream == names.update_params:
                return Reply(self._update(entry))
            if entry.stream == names.hot_words:
                return Reply([(yield from self._favour(entry))])
            raise ProtocolError(
                f"the server does not read the stream {entry.stream!r}: send to one of "
                "docs/protocol.md"
            )
        except (ProtocolError, SettingsError, HotWordError, BackendError) as error:
            return Reply([self.refusal(str(error), entry)])

    def _foreign(self, entry: Entry) -> str:
        """Return why an entry is refused since another client holds the session. Empty if not."""
        name, now = client_of(entry.fields), entry.id[0]
        if name != self.client:
            if self._heard is None and self.client:
                self._heard = now  # Another server heard it last.
            recent = self._heard is not None and abs(now - self._heard) <= HOLD_MS
            free = not self.frames or entry.stream == self.streams.reset
            # Clients without a name hold a session only during a sentence.
            if not free or (recent and (self.client or self.frames)):
                holder = f"the client {self.client!r}" if self.client else "a client without a name"
                own = f"the client {name!r}" if name else "one without a name"
                return (
                    f"this session is in use by {holder}, and this entry is from {own}: open a "
                    f"session, or send a reset {HOLD_MS / 1000:g} s after the other's last entry"
                )
        self._hold(name, now)
        return ""

    def _hold(self, name: str, heard: int | None) -> None:
        if name != self.client:
            self.client, self._description = name, None
        self._heard = heard

    def failed(self, entry: Entry, error: Exception) -> Message:
        """Drop the current sentence and return the error message for an entry that failed by a
        fault of the server."""
        reason = (
            f"the server failed on this entry ({type(error).__name__}: {shortened(str(error))})"
        )
        return self.dropped(entry, f"{reason}; its log says more")

    def dropped(self, entry: Entry, reason: str) -> Message:
        """Drop the current sentence as `lose` does, what still comes of it only if it has begun."""
        ended = entry.stream in (self.streams.reset, self.streams.finalize)
        begun = self.frames > 0 or entry.stream == self.streams.input
        return self.lose(entry, reason, more=begun and not ended)

    def lose(self, entry: Entry, reason: str, more: bool = True) -> Message:
        """Drop the current sentence and return the error message for it.

        With `more`, what still comes of it is refused until its finalize or the next reset.
        """
        # Nobody knows in what state the old search is.
        self._search = self._model.search(self._settings, self.hot_words)
        self.lost = reason if more else ""
        return self.refusal(f"{reason}: the sentence is dropped; {_AGAIN}", entry)

    def _refuse_rest(self, entry: Entry) -> None:
        """Raise ProtocolError for an entry of a sentence whose beginning is lost."""
        lost, names = self.lost, self.streams
        if entry.stream in (names.reset, names.finalize):
            self.lost = ""
        if lost and entry.stream in (names.input, names.finalize):
            raise ProtocolError(f"the beginning of this sentence is lost ({lost}); {_AGAIN}")

    def args(self) -> Message:
        """Return the current settings under their published names, for `remote_lm_args`."""
        values = {
            "lm_path": self._model.folder,
            **{name: getattr(self._settings, name) for name in OURS},
            **dict.fromkeys(NOT_NEEDED, 0),
            "protocol_version": PROTOCOL_VERSION,
            "server_version": version(),
        }
        sent = {name: str(value).encode() for name, value in values.items()}
        return Message(self.streams.args, sent)

    def description(self) -> str:
        """Return as JSON what the client changed, for `restore` by another server."""
        # It goes out with every answer, and changes rarely.
        if self._description is None:
            # Settings that the client left alone are each server's own.
            found: dict[str, object] = {
                "settings": {name: getattr(self._settings, name) for name in sorted(self._asked)}
            }
            if self.client:
                found["client"] = self.client
            if self._asked_words:
                found["hot_words"] = {
                    word: {"weight": one.weight, "pronunciations": one.pronunciations}
                    for word, one in self.hot_words.items()
                }
            self._description = json.dumps(found)
        return self._description

    def restore(self, description: str | bytes) -> None:
        """Apply the `description` of another server's session.

        Raises:
          ValueError: it cannot be used here (made by another version).
        """
        given = json.loads(description)
        # Before what may fail: the sentence under way is this client's.
        client = given.get("client", "")
        if not isinstance(client, str):
            raise ValueError(f"the client is {shortened(repr(client), 100)}; needed its name")
        self._hold(client[:MAX_REQUEST_ID], None)
        asked = {str(name): str(value).encode() for name, value in given["settings"].items()}
        words = given.get("hot_words")
        self.apply(asked, None if words is None else parse_hot_words(json.dumps(words)))

    def apply(self, fields: Mapping[str, bytes], words: Mapping[str, HotWord] | None) -> None:
        """Begin anew with other settings and hot words. None leaves the hot words unchanged.

        Raises:
          ProtocolError, SettingsError: a setting cannot be used here. Nothing has changed.
          HotWordError, BackendError: a hot word cannot be used here. Nothing has changed.
        """
        settings = changed_settings(self._settings, fields, self._ceilings, self._model.backend)
        wanted = self.hot_words if words is None else dict(words)
        self._search = self._model.search(settings, wanted)
        self._asked |= named(fields)
        self._asked_words |= words is not None
        self._settings, self.hot_words, self._description = settings, wanted, None

    def search_frames(self, logits: np.ndarray) -> Sliced[tuple[str, ...]]:
        """Search frames [frames, 41]. Yield between slices and return the best words so far.

        Raises:
          ProtocolError: the sentence would be too long. It is unchanged.
        """
        if not self._search.frames:
            self._search.begin(self._settings)
        settings = self._search.settings
        check_length(self._search.frames + len(logits), settings, self.max_frames)
        words: tuple[str, ...] = ()
        for number, part in enumerate(slices(logits, settings.max_active)):
            if number:
                yield
            words = self._search.step(part)
        return words

    def refusal(self, reason: str, entry: Entry, severity: str = "error") -> Message:
        """Return an error message: instead of an answer, or a warning beside one."""
        answer = {"error": shortened(reason), "stream": entry.stream, "entry_id": entry.name}
        answer["severity"] = severity
        sent = {name: value.encode() for name, value in answer.items()}
        return Message(self.streams.error, sent | echoed(entry.fields))

    def warnings(self, before: Settings, entry: Entry) -> list[Message]:
        """Return a warning for each setting that an entry changed without effect."""
        reasons = idle_settings(before, self._settings, entry.fields, self._model.backend)
        return [self.refusal(reason, entry, WARNING) for reason in reasons]

    def _step(self, entry: Entry) -> Sliced[Message]:
        words = yield from self.search_frames(logits_of(entry.fields))
        partial = {"lm_response_partial": " ".join(words).encode(), **echoed(entry.fields)}
        return Message(self.streams.partial, partial)

    def _finish(self, entry: Entry, context: str) -> Sliced[Reply]:
        settings = self._search.settings
        hypotheses = self._search.finish()

        def compose(answer: Answer) -> list[Message]:
            fields, left_out = final_fields(answer, context)
            sent = fields | echoed(entry.fields)
            messages = [
                Message(self.streams.final, sent),
                self._done(self.streams.done_finalizing, entry),
            ]
            if answer.problem:
                messages.append(self.refusal(f"not rescored: {answer.problem}", entry, WARNING))
            if left_out:
                messages.append(self.refusal(left_out, entry, WARNING))
            return messages

        pending = yield from self._answering.submitting(hypotheses, settings, context)
        return Reply([], pending, compose)

    def _update(self, entry: Entry) -> list[Message]:
        before = self._settings
        settings = changed_settings(before, entry.fields, self._ceilings, self._model.backend)
        # A search with them is made first: an entry that it refuses must not change anything.
        search = self._model.search(settings, self.hot_words)
        self._settings, self._description = settings, None
        self._asked |= named(entry.fields)
        if not self._search.frames:
            self._search = search
        done = self._done(self.streams.done_updating_params, entry)
        return [self.args(), done, *self.warnings(before, entry)]

    def _favour(self, entry: Entry) -> Sliced[Message]:
        if "words" not in entry.fields:
            raise ProtocolError(
                f"the entry has the fields {shortened(str(sorted(entry.fields)), 200)}; needed "
                "`words`: JSON of words and weights, {} for none"
            )
        if self._search.frames:
            raise ProtocolError(
                f"a sentence of {self._search.frames} frames is under way; hot words change "
                "between sentences: send them after finalize or reset"
            )
        words = parse_hot_words(entry.fields["words"])
        yield from guess_ahead(words)
        self.apply({}, words)
        return self._done(self.streams.done_hot_words, entry)

    @staticmethod
    def _done(stream: str, entry: Entry) -> Message:
        return Message(stream, {"done": b"1", **echoed(entry.fields)})


def final_fields(answer: Answer, context: str) -> tuple[dict[str, bytes], str]:
    """Return an answer as the fields of a final entry or of a job's result, and a warning where
    `scoring` does not hold all hypotheses. Empty: it does."""
    scoring, count = _scoring(answer.hypotheses)
    warning = ""
    if count < len(answer.hypotheses):
        warning = (
            f"scoring holds the {count} best of {len(answer.hypotheses)} hypotheses, which is all "
            f"that fits {MAX_SCORING} bytes: lower nbest or send shorter sentences"
        )
    fields = {
        "lm_response_final": answer.sentence,
        "scoring": scoring,
        "context_str": context,
        "rescored": str(int(answer.rescored)),
        "word_confidences": json.dumps([round(one, 6) for one in answer.word_confidences]),
    }
    if answer.confidence is not None:
        fields["confidence"] = repr(round(answer.confidence, 6))
    if answer.confidence is not None and answer.temperature is not None:
        fields["temperature"] = repr(answer.temperature)
    if answer.problem:
        fields["problem"] = answer.problem
    return {name: value.encode() for name, value in fields.items()}, warning


def _scoring(hypotheses: Sequence[Hypothesis]) -> tuple[str, int]:
    """Return the field `scoring` and how many of the hypotheses are in it."""
    size = 0
    parts: list[str] = []
    for one in hypotheses:
        part = encode_scoring([one])
        size += len(part.encode()) + 1
        if parts and size > MAX_SCORING:
            break
        parts.append(part)
    return ";".join(parts), len(parts)
