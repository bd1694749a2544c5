"""One client's conversation as a state machine: an entry comes in, the entries that answer it go
out.

The messages are those of the published server (reset, input, finalize, update_params and their
answers) and hot words; a message that cannot be used is answered on the error stream and leaves the
state as it was. A sentence whose rescoring takes a while is answered by a promise (`Pending`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lm_server.hypothesis import Hypothesis
from lm_server.processes import version
from lm_server.protocol import (
    MAX_MESSAGE_FRAMES,
    PROTOCOL_VERSION,
    WARNING,
    ProtocolError,
    decode_logits,
    encode_scoring,
    request_id,
    session_streams,
)
from lm_server.rescoring.answer import Answer, complete
from lm_server.search.hot_words import HotWord, HotWordError, parse_hot_words
from lm_server.search.interface import NO_HOT_WORDS, BackendError, SearchModel
from lm_server.serving.parameters import NOT_NEEDED, OURS, changed_settings, idle_settings
from lm_server.settings import Settings, SettingsError

STEP_FRAMES = 100
"""Frames searched at a time; between two of them other sessions and the heartbeat's thread get
their turn."""


@dataclass(frozen=True)
class Message:
    """An entry of a Redis stream: the stream's name and the entry's fields."""

    stream: str
    fields: Mapping[str, bytes]


class Finish(Protocol):
    """How candidates become an answer: at once, or later and beside the search."""

    def __call__(
        self, hypotheses: Sequence[Hypothesis], settings: Settings, context: str
    ) -> Answer | Future[Answer]:
        """As `answer.complete` and `rescore.RescoringQueue.submit`."""


class Pending:
    """The answer to a finalize whose rescoring is not done yet."""

    def __init__(
        self,
        session: Session,
        future: Future[Answer],
        found: tuple[Sequence[Hypothesis], Settings, str],
        entry: tuple[str, str, Mapping[str, bytes]],
    ) -> None:
        self.future = future
        self._session, self._found, self._entry = session, found, entry

    def messages(self) -> list[Message]:
        """The answer, once `future` is done; the n-gram model's if the rescoring failed."""
        try:
            return self._session.final(self.future.result(timeout=0), self._found[2], *self._entry)
        except Exception as error:
            # A queue that is closed or a thread that failed; the sentence must still be answered.
            return self.without_rescoring(f"{type(error).__name__}: {error}")

    def without_rescoring(self, problem: str) -> list[Message]:
        """The n-gram model's answer, marked so, with the reason on the error stream."""
        hypotheses, settings, context = self._found
        answer = replace(complete(hypotheses, settings, None, context), problem=problem)
        return self._session.final(answer, context, *self._entry)


class Session:
    """State of one client: settings, hot words, and the search of the sentence under way."""

    def __init__(
        self,
        model: SearchModel,
        settings: Settings,
        session: str = "",
        finish: Finish | None = None,
        hot_words: Mapping[str, HotWord] = NO_HOT_WORDS,
        max_frames: int = MAX_MESSAGE_FRAMES,
    ) -> None:
        """Begins a conversation.

        Args:
          model: what is searched with.
          settings: how.
          session: the session's id; empty is the default session with the published streams.
          finish: makes the answer of the search's candidates; None: the n-gram model's at once.
          hot_words: words that the search favours.
          max_frames: of one sentence, at most MAX_MESSAGE_FRAMES.
        """
        self.max_frames = max_frames
        self.between: Callable[[], None] = lambda: None
        """Called between parts of a long search, so that other sessions need not wait for it."""
        self.name = session
        self.streams = session_streams(session)
        self.hot_words = dict(hot_words)
        self._model = model
        self._settings = settings
        self._finish_search: Finish = finish or _at_once
        self._search = model.search(settings, self.hot_words)
        self._asked: set[str] = set()
        self._asked_words = False
        self._description: str | None = None

    @property
    def settings(self) -> Settings:
        """Those of the next sentence."""
        return self._settings

    @property
    def frames(self) -> int:
        """Frames of the sentence under way."""
        return self._search.frames

    def handle(
        self, stream: str, entry_id: str, fields: Mapping[str, bytes], context: str = ""
    ) -> list[Message] | Pending:
        """Takes one entry and gives the entries that answer it, in the order in which they must be
        sent.

        Args:
          stream: the stream that the entry came on.
          entry_id: its id, told back in an error.
          fields: its fields.
          context: the context string of this moment; a final answer carries it.
        """
        names = self.streams
        try:
            if stream == names.reset:
                self._search.begin(self._settings)
                return [self._done(names.done_resetting, fields)]
            if stream == names.input:
                return [self._step(fields)]
            if stream == names.finalize:
                return self._finish(context, stream, entry_id, fields)
            if stream == names.update_params:
                return self._update(stream, entry_id, fields)
            if stream == names.hot_words:
                return self._favour(fields)
            raise ProtocolError(f"the stream {stream!r} is none of those that the server reads")
        except (ProtocolError, SettingsError, HotWordError, BackendError) as error:
            return [self.refusal(str(error), stream, entry_id, fields)]

    def failed(
        self, stream: str, entry_id: str, fields: Mapping[str, bytes], error: Exception
    ) -> Message:
        """The answer to an entry on which `handle` failed by a fault of ours; begins anew.

        The sentence under way is dropped, because nobody knows in what state its search is.
        """
        self._search = self._model.search(self._settings, self.hot_words)
        text = (
            f"the server failed on this entry ({type(error).__name__}: {error}) and dropped the "
            "sentence under way: send reset, then the sentence again; its log says more"
        )
        return self.refusal(text, stream, entry_id, fields)

    def args(self) -> Message:
        """The settings as they stand, for `remote_lm_args`, under their published names."""
        values = {
            "lm_path": str(self._model.folder),
            **{name: getattr(self._settings, name) for name in OURS},
            **dict.fromkeys(NOT_NEEDED, 0),
            "protocol_version": PROTOCOL_VERSION,
            "server_version": version(),
        }
        return _message(self.streams.args, {name: str(value) for name, value in values.items()})

    def description(self) -> str:
        """Settings and hot words as JSON, for another server to go on with (`restore`)."""
        # It goes out with every answer, and changes rarely.
        if self._description is None:
            self._description = self._describe()
        return self._description

    def _describe(self) -> str:
        # Only what the client asked for: the rest is each server's own, as it was started.
        found: dict[str, object] = {
            "settings": {name: getattr(self._settings, name) for name in sorted(self._asked)}
        }
        if self._asked_words:
            found["hot_words"] = {
                word: {"weight": one.weight, "pronunciations": list(map(list, one.pronunciations))}
                for word, one in self.hot_words.items()
            }
        return json.dumps(found)

    def restore(self, description: str | bytes) -> None:
        """Takes over what `description` of another server's session gave.

        Raises:
          ValueError: it cannot be used here (made by another version).
        """
        given = json.loads(description)
        asked = {str(name): str(value).encode() for name, value in given["settings"].items()}
        words = given.get("hot_words")
        self.apply(asked, None if words is None else parse_hot_words(json.dumps(words)))

    def apply(self, fields: Mapping[str, bytes], words: Mapping[str, HotWord] | None) -> None:
        """Begins anew with other settings and hot words; refuses both or takes both. Without
        `words`, those that the server was started with stay.

        Raises:
          ProtocolError, SettingsError: a setting cannot be used here.
          HotWordError, BackendError: a hot word cannot be used here.
        """
        settings = changed_settings(self._settings, fields)
        wanted = self.hot_words if words is None else dict(words)
        self._search = self._model.search(settings, wanted)
        self._asked |= {name for name in fields if name in OURS}
        self._asked_words |= words is not None
        self._settings, self.hot_words, self._description = settings, wanted, None

    def search_frames(self, logits: np.ndarray) -> tuple[str, ...]:
        """Takes frames [frames, 41] of the sentence; the best words so far.

        Raises:
          ProtocolError: the sentence becomes too long; it is unchanged then.
        """
        if not self._search.frames:
            self._search.begin(self._settings)
        if self._search.frames + len(logits) > self.max_frames:
            raise ProtocolError(
                f"the sentence would have {self._search.frames + len(logits)} frames; at most "
                f"{self.max_frames} are possible: send finalize or reset between sentences"
            )
        words: tuple[str, ...] = ()
        for start in range(0, max(len(logits), 1), STEP_FRAMES):
            if start:
                self.between()
            words = self._search.step(logits[start : start + STEP_FRAMES])
        return words

    def final(
        self,
        answer: Answer,
        context: str,
        stream: str,
        entry_id: str,
        fields: Mapping[str, bytes],
    ) -> list[Message]:
        """The entries that end a sentence; a problem of the rescoring comes after them."""
        sent = {
            **final_fields(answer, context),
            **request_id(fields),
        }
        messages = [Message(self.streams.final, sent)]
        messages.append(self._done(self.streams.done_finalizing, fields))
        if answer.problem:
            text = f"not rescored: {answer.problem}"
            messages.append(self.refusal(text, stream, entry_id, fields, WARNING))
        return messages

    def refusal(
        self,
        reason: str,
        stream: str,
        entry_id: str,
        fields: Mapping[str, bytes],
        severity: str = "error",
    ) -> Message:
        """An error entry: instead of an answer, or as a warning beside one."""
        answer = {"error": reason, "stream": stream, "entry_id": entry_id, "severity": severity}
        sent = {name: value.encode() for name, value in answer.items()}
        return Message(self.streams.error, sent | request_id(fields))

    def _step(self, fields: Mapping[str, bytes]) -> Message:
        if "logits" not in fields:
            raise ProtocolError(
                f"the entry has the fields {sorted(fields)}; needed `logits`: "
                "float32 [frames, 41] as raw bytes"
            )
        words = self.search_frames(decode_logits(fields["logits"]))
        partial = {"lm_response_partial": " ".join(words).encode(), **request_id(fields)}
        return Message(self.streams.partial, partial)

    def _finish(
        self, context: str, stream: str, entry_id: str, fields: Mapping[str, bytes]
    ) -> list[Message] | Pending:
        settings = self._search.settings
        hypotheses = self._search.finish()
        try:
            answer = self._finish_search(hypotheses, settings, context)
        except Exception as error:
            # The search is done and its answer must not be lost with the rescoring.
            answer = replace(
                complete(hypotheses, settings, None, context),
                problem=f"{type(error).__name__}: {error}",
            )
        if isinstance(answer, Answer):
            return self.final(answer, context, stream, entry_id, fields)
        found = (hypotheses, settings, context)
        return Pending(self, answer, found, (stream, entry_id, fields))

    def _update(self, stream: str, entry_id: str, fields: Mapping[str, bytes]) -> list[Message]:
        # Everything is checked before anything changes: an entry is taken whole or not at all.
        settings = changed_settings(self._settings, fields)
        warnings = self.warnings(self._settings, settings, stream, entry_id, fields)
        # A search with them, made before they are taken: what it refuses must not stay.
        search = self._model.search(settings, self.hot_words)
        self._settings, self._description = settings, None
        self._asked |= {name for name in fields if name in OURS}
        if not self._search.frames:
            self._search = search
        return [self.args(), self._done(self.streams.done_updating_params, fields), *warnings]

    def warnings(
        self,
        before: Settings,
        after: Settings,
        stream: str,
        entry_id: str,
        fields: Mapping[str, bytes],
    ) -> list[Message]:
        """A warning for each setting that an entry changed without effect."""
        return [
            self.refusal(reason, stream, entry_id, fields, WARNING)
            for reason in idle_settings(before, after, fields, self._model.backend)
        ]

    def _favour(self, fields: Mapping[str, bytes]) -> list[Message]:
        if "words" not in fields:
            raise ProtocolError(
                f"the entry has the fields {sorted(fields)}; needed `words`: JSON of words and "
                "weights, {} for none"
            )
        if self._search.frames:
            raise ProtocolError(
                f"a sentence of {self._search.frames} frames is under way; hot words change "
                "between sentences: send them after finalize or reset"
            )
        words = parse_hot_words(fields["words"])
        self._search = self._model.search(self._settings, words)
        self.hot_words, self._description, self._asked_words = words, None, True
        return [self._done(self.streams.done_hot_words, fields)]

    @staticmethod
    def _done(stream: str, fields: Mapping[str, bytes]) -> Message:
        return Message(stream, {"done": b"1", **request_id(fields)})


def final_fields(answer: Answer, context: str) -> dict[str, bytes]:
    """An answer as the fields of a final entry, or of a job's result."""
    fields = {
        "lm_response_final": answer.sentence,
        "scoring": encode_scoring(answer.scoring()),
        "context_str": context,
        "rescored": str(int(answer.rescored)),
        "word_confidences": json.dumps([round(one, 6) for one in answer.word_confidences]),
    }
    if answer.confidence is not None:
        fields["confidence"] = repr(round(answer.confidence, 6))
    if answer.problem:
        fields["problem"] = answer.problem
    return {name: value.encode() for name, value in fields.items()}


def _at_once(hypotheses: Sequence[Hypothesis], settings: Settings, context: str) -> Answer:
    return complete(hypotheses, settings, None, context)


def _message(stream: str, fields: Mapping[str, str]) -> Message:
    return Message(stream, {name: value.encode() for name, value in fields.items()})
