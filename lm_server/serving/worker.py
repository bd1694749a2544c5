"""Offline decoding for many: jobs from a stream, shared by any number of workers on any machines.

The stream has a consumer group. A job that a worker took is kept from the others by heartbeats;
when these end, another worker takes it. The result is written and the job taken away in one step,
so a job has exactly one result, whatever happens to workers and connections. A job that loses its
worker again and again is answered by an error.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import redis

from lm_server.client.connection import LOST, Backoff, plain, text
from lm_server.errors import UserError
from lm_server.hypothesis import Hypothesis
from lm_server.protocol import (
    JOB_SECONDS,
    REGISTRY,
    ProtocolError,
    batch_key,
    decode_logits,
    request_id,
    results_stream,
)
from lm_server.rescoring.answer import Answer, complete
from lm_server.search.hot_words import HotWord, parse_hot_words
from lm_server.search.interface import NO_HOT_WORDS, Search, SearchModel
from lm_server.serving import scripts
from lm_server.serving.key_types import set_aside, wrong_type
from lm_server.serving.parameters import changed_settings, idle_settings
from lm_server.serving.session import STEP_FRAMES, Finish, final_fields
from lm_server.serving.status import Alive, Heartbeat, Meter, longest_finish, new_name
from lm_server.settings import Settings

_AHEAD = 8
"""Sentences that may wait for their rescoring while the next ones are searched."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """How long a worker holds a job, and how often a job may lose its worker.

    Attributes:
      lease_seconds: without a heartbeat for so long, a job goes to another worker.
      attempts: a job that was given out so often without a result is answered by an error.
      rescore_seconds: a sentence not rescored by then has the n-gram model's answer.
    """

    lease_seconds: float = 10.0
    attempts: int = 3
    rescore_seconds: float = 60.0


@dataclass(frozen=True)
class _Taken:
    id: str
    fields: Mapping[str, bytes]
    attempt: int

    @property
    def batch(self) -> str:
        return text(self.fields.get("batch", b""))

    @property
    def job(self) -> str:
        return text(self.fields.get("job", b""))

    def __str__(self) -> str:
        return f"job {self.job} of batch {self.batch}"


@dataclass
class _Waiting:
    """A job whose search is done."""

    taken: _Taken
    result: dict[str, bytes] | Future[Answer]
    found: tuple[tuple[Hypothesis, ...], Settings, str] | None
    started: float
    warning: str = ""


class Worker:
    """Decodes jobs until it is told to stop."""

    def __init__(
        self,
        client: redis.Redis,
        model: SearchModel,
        settings: Settings,
        finish: Finish | None = None,
        terms: Terms | None = None,
        name: str | None = None,
        hot_words: Mapping[str, HotWord] = NO_HOT_WORDS,
    ) -> None:
        """Prepares the worker.

        Args:
          client: connection to Redis.
          model: what is searched with.
          settings: how, where a job does not say.
          finish: makes the answer of the search's candidates; None: the n-gram model's at once.
          terms: how long jobs are held.
          name: of this worker; no other on this Redis may have it.
          hot_words: words to favour, where a job does not say.
        """
        self.name = name or new_name("worker")
        self.meter = Meter()
        self._client, self._model, self._settings = client, model, settings
        self._finish: Finish = finish or (lambda h, s, c: complete(h, s, None, c))
        self._terms = terms or Terms()
        self._keep = client.register_script(scripts.KEEP_JOB)
        self._done = client.register_script(scripts.FINISH_JOB)
        self._hot_words = dict(hot_words)
        self._use(settings, self._hot_words)
        self._waiting: deque[_Waiting] = deque()
        self._held: set[str] = set()
        self._claimed = 0.0
        self._alive: Alive = lambda within=0.0: None
        self._grouped = False

    def run(self, stop: threading.Event, check: Callable[[], None] = lambda: None) -> None:
        """Decodes jobs until `stop` is set, then finishes those under way; a Redis that goes away
        is waited for.

        Args:
          stop: looked at between jobs.
          check: called as often; may raise to end the loop.
        """
        backoff = Backoff(stop)
        beat = min(1.0, self._terms.lease_seconds / 3)
        with Heartbeat(
            self._client, self.name, "worker", self.meter, self._describe, self._renew, beat
        ) as heartbeat:
            self._alive = heartbeat.alive
            while not (stop.is_set() and (not self._waiting or backoff.failing)):
                self._alive()
                check()
                try:
                    self._round(stop.is_set())
                    if backoff.failing:
                        _log.info("Redis is back")
                    backoff.worked()
                except LOST as error:
                    if wrong_type(error) and self._set_aside({REGISTRY.jobs: "stream"}):
                        self._grouped = False
                        continue
                    if not backoff.failing:
                        _log.error("Redis: %s; trying again until it works", error)
                    self._grouped = False
                    backoff.failed()

    def _round(self, stopping: bool) -> None:
        """Sends what is ready; searches one more sentence, or waits."""
        if not self._grouped:
            self._join()
        self._send_ready()
        if stopping or len(self._waiting) >= _AHEAD:
            self._wait_for_rescoring()
            return
        taken = self._claim_abandoned() or self._take(wait=not self._waiting)
        if taken is None:
            self._wait_for_rescoring()
            return
        if taken.attempt > 1:
            # It may be what ended another worker; nothing else shall go down with it.
            while self._waiting:
                self._wait_for_rescoring()
                self._send_ready()
        self._held.add(taken.id)
        self._waiting.append(self._decode(taken))
        while taken.attempt > 1 and self._waiting:
            self._wait_for_rescoring()
            self._send_ready()
        self._send_ready()

    # Taking

    def _join(self) -> None:
        try:
            self._client.xgroup_create(REGISTRY.jobs, REGISTRY.workers, id="0", mkstream=True)
        except redis.exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._grouped = True

    def _take(self, wait: bool) -> _Taken | None:
        """The next job; with `wait` as soon as there is one, within half a lease."""
        block = int(500 * min(self._terms.lease_seconds, 2.0)) if wait else None
        answer: Any = self._client.xreadgroup(
            REGISTRY.workers, self.name, {REGISTRY.jobs: ">"}, count=1, block=block
        )
        for _, entries in answer or []:
            for id_, fields in entries:
                return _Taken(text(id_), plain(fields), 1)
        return None

    def _claim_abandoned(self) -> _Taken | None:
        """A job whose worker shows no sign of life any more; looked for twice per lease."""
        now = time.monotonic()
        if now - self._claimed < self._terms.lease_seconds / 2:
            return None
        idle = int(1000 * self._terms.lease_seconds)
        answer: Any = self._client.xautoclaim(
            REGISTRY.jobs, REGISTRY.workers, self.name, idle, count=1
        )
        for id_, fields in answer[1]:
            entry = text(id_)
            if not fields:  # Deleted while it was under way.
                self._client.xack(REGISTRY.jobs, REGISTRY.workers, entry)
                continue
            pending: Any = self._client.xpending_range(
                REGISTRY.jobs, REGISTRY.workers, entry, entry, 1
            )
            attempt = int(pending[0]["times_delivered"]) if pending else 2
            _log.warning("took over a job of a lost worker (attempt %d)", attempt)
            self.meter.count("taken_over")
            return _Taken(entry, plain(fields), max(attempt, 2))
        # There may be more after one, so the clock starts only when none is left.
        self._claimed = now
        return None

    def _renew(self) -> None:
        """Keeps our jobs ours; called by the heartbeat's thread."""
        for entry in list(self._held):
            self._keep(keys=[REGISTRY.jobs], args=[REGISTRY.workers, self.name, entry])

    # Decoding

    def _decode(self, taken: _Taken) -> _Waiting:
        started = time.monotonic()
        idle: list[str] = []
        if taken.attempt > self._terms.attempts:
            reason = (
                f"{self._terms.attempts} workers had this job and ended, were lost or could not "
                "write its result; it is not tried again: look at their logs and at its logits"
            )
            return _Waiting(taken, {"error": reason.encode()}, None, started)
        try:
            settings, idle = self._settings_of(taken)
            if "logits" not in taken.fields:
                raise ProtocolError(
                    f"the job has the fields {sorted(taken.fields)}; needed `logits`: "
                    "float32 [frames, 41] as raw bytes"
                )
            logits = decode_logits(taken.fields["logits"])
            words = self._hot_words
            if "hot_words" in taken.fields:
                words = parse_hot_words(taken.fields["hot_words"])
            if self._using != (settings, words):
                self._use(settings, words)
            search = self._search
            search.begin()
            for start in range(0, len(logits), STEP_FRAMES):
                self._alive()
                search.step(logits[start : start + STEP_FRAMES])
            self._alive(within=longest_finish(len(logits)))
            hypotheses = search.finish()
            context = text(taken.fields.get("context", b""))
            result = self._finish(hypotheses, settings, context)
        except (ProtocolError, UserError) as error:
            return _Waiting(taken, {"error": str(error).encode()}, None, started)
        except Exception as error:
            # A fault of ours costs this job its answer, and not the other jobs their worker.
            _log.exception("failed on %s", taken)
            self.meter.count(f"failed_{type(error).__name__}")
            self._use(self._settings, self._hot_words)
            reason = f"the worker failed on it ({type(error).__name__}: {error}); see its log"
            return _Waiting(taken, {"error": reason.encode()}, None, started)
        if isinstance(result, Answer):
            return _Waiting(taken, final_fields(result, context), None, started, "; ".join(idle))
        found = (hypotheses, settings, context)
        return _Waiting(taken, result, found, started, "; ".join(idle))

    def _use(self, settings: Settings, hot_words: Mapping[str, HotWord]) -> None:
        self._search: Search = self._model.search(settings, hot_words)
        self._using = (settings, hot_words)

    def _settings_of(self, taken: _Taken) -> tuple[Settings, list[str]]:
        """A job's settings, and which of them have no effect here and why."""
        if "settings" not in taken.fields:
            return self._settings, []
        try:
            given = json.loads(taken.fields["settings"])
            fields = {str(name): str(value).encode() for name, value in given.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                f"the job's settings are no JSON object ({error}): needed {{NAME: NUMBER}}"
            ) from error
        settings = changed_settings(self._settings, fields)
        return settings, idle_settings(self._settings, settings, fields, self._model.backend)

    # Answering

    def _send_ready(self) -> None:
        while self._waiting:
            one = self._waiting[0]
            if isinstance(one.result, Future):
                assert one.found is not None
                late = time.monotonic() - one.started > self._terms.rescore_seconds
                if not one.result.done() and not late:
                    return
                one.result = self._redeem(one.result, *one.found)
            self._send(one)
            self._waiting.popleft()
            self._held.discard(one.taken.id)

    def _redeem(
        self,
        future: Future[Answer],
        hypotheses: tuple[Hypothesis, ...],
        settings: Settings,
        context: str,
    ) -> dict[str, bytes]:
        """The result of a rescored sentence; the n-gram model's, marked so, if that failed."""
        try:
            answer = future.result(timeout=0)
        except Exception as error:
            if isinstance(error, concurrent.futures.TimeoutError):
                future.cancel()
                problem = f"it took longer than {self._terms.rescore_seconds:g} s"
            else:
                problem = f"{type(error).__name__}: {error}"
            answer = replace(complete(hypotheses, settings, None, context), problem=problem)
        return final_fields(answer, context)

    def _send(self, one: _Waiting) -> None:
        assert isinstance(one.result, dict)
        taken = one.taken
        seconds = time.monotonic() - one.started
        result = {
            "job": taken.job.encode(),
            **one.result,
            **request_id(taken.fields),
            "seconds": f"{seconds:.6f}".encode(),
            "worker": self.name.encode(),
            "attempt": str(taken.attempt).encode(),
        }
        if one.warning:
            result["warning"] = one.warning.encode()
        try:
            keys = [REGISTRY.jobs, batch_key(taken.batch), results_stream(taken.batch)]
        except ProtocolError as error:
            # Nobody can be told: the job does not say where its result goes.
            _log.error("dropped a job: %s", error)
            self.meter.count("errors")
            with self._client.pipeline() as pipeline:
                pipeline.xack(REGISTRY.jobs, REGISTRY.workers, taken.id)
                pipeline.xdel(REGISTRY.jobs, taken.id)
                pipeline.execute()
            return
        flat = [part for pair in result.items() for part in pair]
        arguments: list[Any] = [REGISTRY.workers, taken.id, taken.job, JOB_SECONDS, *flat]
        try:
            written = self._done(keys=keys, args=arguments)
        except redis.exceptions.ResponseError as error:
            if not wrong_type(error):
                raise
            if self._set_aside({keys[2]: "stream"}):
                self._send(one)
                return
            # Who wants a result stands in the batch, and cannot be told. The job stays pending and
            # is tried again after a lease; the others need not wait.
            self.meter.count("errors")
            _log.error("%s: no result written: %s", taken, error)
            return
        if not written:
            self.meter.count("unwanted")
            _log.info("%s had a result, or its client is gone", taken)
        elif "error" in one.result:
            self.meter.count("errors")
            _log.warning("%s: %s", taken, text(one.result["error"]))
        else:
            self.meter.count("sentences")
            self.meter.took("final", seconds)

    def _set_aside(self, needed: Mapping[str, str]) -> bool:
        reasons: dict[str, str] = {}
        with contextlib.suppress(*LOST):
            reasons = set_aside(self._client, needed)
        for reason in reasons.values():
            _log.error("%s", reason)
        return bool(reasons)

    def _wait_for_rescoring(self) -> None:
        if self._waiting and isinstance(self._waiting[0].result, Future):
            concurrent.futures.wait([self._waiting[0].result], timeout=0.5)

    def _describe(self) -> dict[str, str]:
        return {"held_jobs": str(len(self._held))}
