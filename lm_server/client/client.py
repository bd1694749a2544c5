"""Client of the language-model server: logits in, scored sentences out, through Redis streams.

It uses the published NEJM protocol (`lm_server.protocol`), so it works with `lm-server` and with
the published server alike. With `lm-server` it may have a session of its own, so that several
clients are served at once. Every wait watches the error stream too and ends at a time-out. A trial
without an answer is an error that names it.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import redis

from lm_server.client.answers import (
    LanguageModelError,
    LanguageModelUnavailableError,
    Result,
    error_text,
    read_answer,
)
from lm_server.client.connection import mask_password, redis_client, redis_errors
from lm_server.hypothesis import Answer
from lm_server.protocol import (
    CLIENT,
    DEFAULT_SESSION,
    REGISTRY,
    RELEASE,
    WARNING,
    ProtocolError,
    Streams,
    check_logits,
    encode_logits,
    session_streams,
    to_lm_order,
)

Progress = Callable[[int, int], None]
"""Called as progress(trials done, trials in all)."""

_BLOCK_MS = 1000
_KEPT_ENTRIES = 100  # Of each stream that we write. The server has answered all but the newest.
_FIRST_ID = "0-0"


class Client:
    """One connection to a language-model server. A context manager, or call `close`.

    Its state is the last entry seen of each answer stream.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 120.0,
        hello_timeout: float = 10.0,
        streams: Streams | None = None,
        session: str = DEFAULT_SESSION,
        name: str | None = None,
    ) -> None:
        """Connect to Redis. Call `check` to find out whether a server listens there.

        Args:
          url: Redis, for example `redis://:password@127.0.0.1:6379/0` or `unix:///run/redis.sock`.
          timeout: seconds to wait for the answer to logits, parameters or the end of a sentence.
          hello_timeout: seconds to wait for the answer to a reset, which every server sends at
            once.
          streams: other stream names than the published ones.
          session: id of a session that is opened here and closed by `close`. Empty: the default
            session, which all clients without one share.
          name: of this client. `lm-server` refuses other clients in a session while one that named
            itself uses it. None: a random name. Empty: no name.

        Raises:
          LanguageModelUnavailableError: no Redis answers at `url`, or it refuses the login.
          LanguageModelError: the URL is no Redis URL, or the server opens no such session.
        """
        self.session = session
        self.name = f"client-{secrets.token_hex(4)}" if name is None else name
        self._named = False
        self.url = mask_password(url)
        self.timeout = timeout
        self.hello_timeout = hello_timeout
        self._streams = streams or session_streams(session)
        self._redis: Any = redis_client(url)
        streams_read = (
            self._streams.done_resetting,
            self._streams.partial,
            self._streams.final,
            self._streams.done_finalizing,
            self._streams.done_updating_params,
            self._streams.error,
        )
        self._seen = dict.fromkeys(streams_read, _FIRST_ID)
        with self._redis_errors():
            self._redis.ping()
        if session != DEFAULT_SESSION:
            self._ask("open", hello_timeout)
        with self._redis_errors():
            self._skip_old_answers()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and the session if it is our own."""
        if self._named and self.session == DEFAULT_SESSION:
            # Should this fail, the session is free some seconds later.
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                self._add(self._streams.reset, {"done": 0, RELEASE: 1})
        if self.session != DEFAULT_SESSION:
            # Should this fail, the server closes it when it has been idle for a while.
            with contextlib.suppress(LanguageModelError):
                self._ask("close", self.hello_timeout)
        self._redis.close()

    def settings(self) -> dict[str, str]:
        """Return the settings that the server published last, {} if there are none in time.

        A server publishes them a moment after its start, and again after a FLUSHALL.

        Raises:
          LanguageModelUnavailableError: Redis does not answer.
        """
        deadline, found = time.monotonic() + self.hello_timeout, None
        with self._redis_errors():
            while not found and time.monotonic() < deadline:
                found = self._redis.xrevrange(self._streams.args, count=1)
                time.sleep(0.0 if found else 0.05)
        entry = found[0][1] if found else {}
        return {key.decode(): value.decode("utf-8", "replace") for key, value in entry.items()}

    def check(self) -> None:
        """Make sure that a server answers, by a reset with the short time-out.

        Raises:
          LanguageModelUnavailableError: none does.
          LanguageModelError: it answers with an error.
        """
        self.reset()

    def reset(self) -> None:
        """Start a new sentence and skip answers to anything sent earlier.

        Raises:
          LanguageModelUnavailableError: no answer in time.
          LanguageModelError: the server refused.
        """
        with self._redis_errors():
            self._skip_old_answers()
            self._add(self._streams.reset, {"done": 0})
        self._wait(self._streams.done_resetting, "the answer to a reset", self.hello_timeout)
        with self._redis_errors():
            # A late answer to an earlier client's logits would be mistaken for the answer to ours.
            self._skip_old_answers()

    def send(self, logits: np.ndarray) -> str:
        """Send frames of the current sentence and return the best text so far.

        Args:
          logits: [frames, 41] in the RNN's order, one row per frame of 80 ms.

        Raises:
          ProtocolError: the shape is wrong or a value is not finite. Nothing was sent.
          LanguageModelUnavailableError: no answer in time.
          LanguageModelError: the server refused.
        """
        payload = encode_logits(to_lm_order(check_logits(logits)))
        with self._redis_errors():
            self._add(self._streams.input, {"logits": payload})
        awaited = f"the partial sentence after {len(logits)} frames"
        answer = self._wait(self._streams.partial, awaited, self.timeout)
        return answer.get(b"lm_response_partial", b"").decode()

    def finalize(self) -> Answer:
        """End the sentence and return its answer. See `read_answer`.

        Raises:
          LanguageModelUnavailableError: no answer in time.
          LanguageModelError: the server refused, or found no sentence at all.
        """
        with self._redis_errors():
            self._add(self._streams.finalize, {"done": 0})
        answer = self._wait(self._streams.final, "the final sentences", self.timeout)
        self._wait(self._streams.done_finalizing, "the end of finalizing", self.timeout)
        return read_answer(answer)

    def update_params(self, **params: float | str) -> None:
        """Change settings of the server, such as acoustic_scale, blank_penalty, beam or nbest.

        `preset="fast"` changes all those that the preset decides.

        Raises:
          LanguageModelUnavailableError: no answer in time.
          LanguageModelError: the server refused a setting.
        """
        with self._redis_errors():
            # Whole numbers without a point: the published server reads nbest with int().
            fields: dict[str, int | float | str] = {
                name: value
                if isinstance(value, str)
                else (int(value) if isinstance(value, int) else float(value))
                for name, value in params.items()
            }
            self._add(self._streams.update_params, fields)
        awaited = f"the new settings {', '.join(params)} to be accepted"
        self._wait(self._streams.done_updating_params, awaited, self.timeout)

    def decode(self, logits: np.ndarray, chunk_frames: int | None = None) -> Answer:
        """Decode one whole trial: reset, send, finalize.

        Args:
          logits: [frames, 41] in the RNN's order.
          chunk_frames: frames per message. None: all frames in one.

        Raises:
          ProtocolError: the shape is wrong or a value is not finite.
          LanguageModelUnavailableError: no answer in time.
          LanguageModelError: the server refused, or found no sentence at all.
        """
        logits = check_logits(logits)
        self.reset()
        step = chunk_frames or max(len(logits), 1)
        for start in range(0, max(len(logits), 1), step):
            self.send(logits[start : start + step])
        return self.finalize()

    def decode_all(
        self, logits: Sequence[np.ndarray], names: Sequence[str], progress: Progress | None = None
    ) -> Iterator[Result]:
        """Decode trials one after another. A failed one is yielded too, with its reason.

        Args:
          logits: per trial [frames, 41] in the RNN's order.
          names: per trial, such as `t15.2023.08.13/trial_0007`.
          progress: called after each trial.

        Raises:
          LanguageModelUnavailableError: the server is gone, so that all further trials would fail
            too.
          ValueError: there are more names than trials, or fewer.
        """
        if len(logits) != len(names):
            raise ValueError(
                f"found {len(logits)} trials and {len(names)} names; needed one name each"
            )
        for done, (frames, name) in enumerate(zip(logits, names, strict=True), start=1):
            started = time.perf_counter()
            answer, reason = None, None
            try:
                answer = self.decode(frames)
            except LanguageModelUnavailableError as error:
                self._still_there(name, done - 1, len(names), error)
                reason = str(error)
            except (LanguageModelError, ProtocolError) as error:
                reason = str(error)
            yield Result(name, answer, reason, time.perf_counter() - started)
            if progress is not None:
                progress(done, len(names))

    def _still_there(self, name: str, done: int, count: int, cause: LanguageModelError) -> None:
        try:
            self.check()
        except LanguageModelError as error:
            raise LanguageModelUnavailableError(
                f"{cause}; this was trial {name}, after {done} of {count} trials"
            ) from error

    def _ask(self, action: str, timeout: float) -> None:
        """Have the session opened or closed.

        Raises:
          LanguageModelUnavailableError: no server answers.
          LanguageModelError: it is refused.
        """
        mark = secrets.token_hex(8)
        request = {"action": action, "session": self.session, "request_id": mark}
        with self._redis_errors():
            newest = self._redis.xrevrange(REGISTRY.answers, count=1)
            position = newest[0][0] if newest else _FIRST_ID
            self._redis.xadd(REGISTRY.requests, request, maxlen=_KEPT_ENTRIES, approximate=True)
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            block = max(1, min(_BLOCK_MS, int(1000 * left)))
            with self._redis_errors():
                found = self._redis.xread({REGISTRY.answers: position}, block=block)
            for _, entries in found:
                for id_, fields in entries:
                    position = id_
                    if fields.get(b"request_id") == mark.encode():
                        if b"error" in fields:
                            raise LanguageModelError(
                                f"the server does not {action} the session: {error_text(fields)}"
                            )
                        return
        raise LanguageModelUnavailableError(
            f"waited {timeout:g} s for the session {self.session!r} to {action} on {self.url}, and "
            "nothing came: is `lm-server serve --lm DIR --redis URL` running? The published server "
            "has no sessions"
        )

    def _add(self, stream: str, fields: Mapping[str, bytes | float | str]) -> None:
        named = {CLIENT: self.name.encode()} if self.name else {}
        self._redis.xadd(stream, {**fields, **named}, maxlen=_KEPT_ENTRIES, approximate=True)

    def _skip_old_answers(self) -> None:
        """Move behind the newest entry of each answer stream.

        The published client starts at the server's clock instead and misses an answer of the same
        millisecond.
        """
        pipeline = self._redis.pipeline(transaction=False)
        for stream in self._seen:
            pipeline.xrevrange(stream, count=1)
        for stream, newest in zip(self._seen, pipeline.execute(), strict=True):
            # An empty stream has nothing to skip. It may also have been deleted and begun anew.
            self._seen[stream] = newest[0][0] if newest else _FIRST_ID

    def _wait(self, stream: str, awaited: str, timeout: float) -> dict[bytes, bytes]:
        deadline = time.monotonic() + timeout
        watched = (self._streams.error, stream)
        while (left := deadline - time.monotonic()) > 0:
            block = max(1, min(_BLOCK_MS, int(1000 * left)))
            with self._redis_errors():
                found = self._redis.xread({name: self._seen[name] for name in watched}, 1, block)
            entries = {name.decode(): entry[0] for name, entry in found}
            for name in watched:
                if name in entries:
                    self._seen[name], fields = entries[name]
                    if fields.get(b"severity") == WARNING.encode():
                        # It stands beside an answer with the same text as `problem`.
                        continue
                    if fields.get(CLIENT.encode(), self.name.encode()) != self.name.encode():
                        continue  # It answers another client.
                    # The published server does not repeat names.
                    self._named = CLIENT.encode() in fields
                    if name == self._streams.error:
                        raise LanguageModelError(
                            f"the server answered with an error: {error_text(fields)}"
                        )
                    return dict(fields)
        raise LanguageModelUnavailableError(
            f"waited {timeout:g} s for {awaited} on the stream {stream!r} of {self.url}, and "
            f"nothing came: is `lm-server serve --lm DIR --redis {self.url}` running, still "
            "loading, or serving another client?"
        )

    def _redis_errors(self) -> contextlib.AbstractContextManager[None]:
        return redis_errors(self.url, "lm-server serve")
