"""Offline decoding of jobs from a stream, shared by any number of workers on any machines.

The stream has a consumer group. A worker keeps its job by heartbeats. When these end, another
worker claims the job. The result is written and the job deleted in one step, so a job has exactly
one result, whatever happens to workers and connections. A job that loses its worker again and again
is answered by an error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis

from lm_server.client.connection import LOST, plain, text
from lm_server.errors import UserError, shortened
from lm_server.protocol import (
    JOB_SECONDS,
    MAX_CONTEXT,
    MAX_JSON,
    REGISTRY,
    ProtocolError,
    batch_key,
    check_job_name,
    echoed,
    process_key,
    results_stream,
    unique,
)
from lm_server.rescoring.answering import Answering, PendingAnswer
from lm_server.search.hot_words import HotWord, parse_hot_words
from lm_server.search.interface import NO_HOT_WORDS, Search, SearchModel
from lm_server.search.sliced import Sliced
from lm_server.serving.keys import scripts
from lm_server.serving.keys.dead_letters import KEPT, dead_letter
from lm_server.serving.keys.key_types import set_aside, wrong_type
from lm_server.serving.loop import run_rounds
from lm_server.serving.parameters import NO_CEILINGS, changed_settings, idle_settings
from lm_server.serving.session import check_length, final_fields, logits_of, slices
from lm_server.serving.status import STUCK_SECONDS, Heartbeat, Meter, longest_finish, new_name
from lm_server.settings import Settings

_AHEAD = 8
"""Sentences that may wait for their rescoring while the next ones are searched."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """How long a worker holds a job, and how often a job may lose its worker.

    Attributes:
      lease_seconds: without a heartbeat for so long, a job goes to another worker.
      attempts: a job that was given to so many workers without a result is answered by an error.
      stuck_seconds: a search without a sign of life for so long ends the heartbeats.
      job_seconds: computing time that one job may take. More is answered by an error.
    """

    lease_seconds: float = 10.0
    attempts: int = 3
    stuck_seconds: float = STUCK_SECONDS
    job_seconds: float = 600.0


@dataclass
class _Job:
    """A job in the hands of this worker.

    Attributes:
      id: of its entry.
      fields: of its entry.
      attempt: how often it was given to a worker, this time included.
      started: when its decoding began (monotonic seconds).
      result: the result's fields, or the answer that they are made of.
      warning: what the client should know beside the result.
      dead: why an operator should look at it. Empty: no need.
    """

    id: str
    fields: Mapping[str, bytes]
    attempt: int
    started: float = 0.0
    result: dict[str, bytes] | PendingAnswer | None = None
    warning: str = ""
    dead: str = ""

    def of(self, field: str) -> str:
        """Return a field as str. Empty without it."""
        return text(self.fields.get(field, b""))

    @property
    def context(self) -> str:
        """The preceding text, cut like a session's."""
        return text(self.fields.get("context", b"")[-MAX_CONTEXT:])

    def __str__(self) -> str:
        return shortened(f"job {self.of('job')!r} of batch {self.of('batch')!r}", 200)


class Worker:
    """Decodes jobs until it is stopped."""

    def __init__(
        self,
        client: redis.Redis,
        model: SearchModel,
        settings: Settings,
        answering: Answering | None = None,
        terms: Terms | None = None,
        name: str | None = None,
        hot_words: Mapping[str, HotWord] = NO_HOT_WORDS,
        ceilings: Mapping[str, float] = NO_CEILINGS,
        busy: Callable[[bool], None] = lambda busy: None,
    ) -> None:
        """Prepare the worker.

        Args:
          client: connection to Redis.
          model: the model folder that is searched.
          settings: the settings of jobs that have none.
          answering: makes answers of hypotheses. None: at once, with the n-gram model's scores.
          terms: how long jobs are held.
          name: of this worker, unique on this Redis.
          hot_words: the hot words of jobs that have none.
          ceilings: by setting, the greatest value that a job may choose.
          busy: called when jobs are in hand (True) and when none is any more (False). A death in
            between is a job's fault.
        """
        self._ceilings, self._busy = ceilings, busy
        self.name = name or new_name("worker")
        self.meter = Meter()
        self._client, self._model, self._settings = client, model, settings
        self._answering = answering or Answering()
        self._terms = terms or Terms()
        self._keep = client.register_script(scripts.KEEP_JOB)
        self._finish = client.register_script(scripts.FINISH_JOB)
        self._forget = client.register_script(scripts.FORGET_WORKER)
        self._hot_words = dict(hot_words)
        self._use(settings, self._hot_words)
        self._waiting: deque[_Job] = deque()
        self._held: set[str] = set()
        self._claimed = 0.0
        self._grouped = False
        self._heartbeat = Heartbeat(
            *(client, self.name, "worker", self.meter, self._describe, self._renew),
            seconds=min(1.0, self._terms.lease_seconds / 3),
            stuck_seconds=self._terms.stuck_seconds,
        )

    def run(self, stop: threading.Event, check: Callable[[], None] = lambda: None) -> None:
        """Decode jobs until `stop` is set, then finish those begun. Wait for a lost Redis.

        Args:
          stop: looked at between jobs.
          check: called as often. May raise to end the loop.
        """

        def ended(failing: bool) -> bool:
            self._heartbeat.alive()
            # The group is gone with a Redis that restarted without a file.
            self._grouped = self._grouped and not failing
            if stop.is_set() and (not self._waiting or failing):
                return True
            check()
            return False

        with self._heartbeat:
            run_rounds(lambda: self._round(stop.is_set()), ended, stop, self._set_jobs_aside)
            with contextlib.suppress(*LOST):
                self._forget(keys=[REGISTRY.jobs], args=[REGISTRY.workers, self.name])

    def _round(self, stopping: bool) -> None:
        """Send what is ready. Search one more sentence, or wait."""
        if not self._grouped:
            self._join()
        self._send_ready()
        job = None
        if not stopping and len(self._waiting) < _AHEAD:
            job = self._claim_abandoned() or self._take(wait=not self._waiting)
        if job is None:
            self._wait_for_rescoring()
            return
        # A job that was given before may be what ended another worker; no other job may be in its
        # company.
        alone = job.attempt > 1
        self._send_all(alone)
        self._held.add(job.id)
        self._busy(True)
        self._waiting.append(job)
        self._decode(job)
        self._send_all(alone)
        self._send_ready()

    def _send_all(self, wanted: bool) -> None:
        while wanted and self._waiting:
            self._wait_for_rescoring()
            self._send_ready()

    # Taking

    def _join(self) -> None:
        try:
            self._client.xgroup_create(REGISTRY.jobs, REGISTRY.workers, id="0", mkstream=True)
        except redis.exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._grouped = True

    def _take(self, wait: bool) -> _Job | None:
        """Return the next job. With `wait`, wait for half a lease."""
        block = int(500 * min(self._terms.lease_seconds, 2.0)) if wait else None
        answer: Any = self._client.xreadgroup(
            REGISTRY.workers, self.name, {REGISTRY.jobs: ">"}, count=1, block=block
        )
        for _, entries in answer or []:
            for id_, fields in entries:
                return _Job(text(id_), plain(fields), 1)
        return None

    def _claim_abandoned(self) -> _Job | None:
        """Return a job whose worker shows no sign of life. Look for one twice per lease."""
        now = time.monotonic()
        if now - self._claimed < self._terms.lease_seconds / 2:
            return None
        idle = int(1000 * self._terms.lease_seconds)
        answer: Any = self._client.xautoclaim(
            REGISTRY.jobs, REGISTRY.workers, self.name, idle, count=1
        )
        for id_, fields in answer[1]:
            entry = text(id_)
            if not fields:  # Deleted while a worker had it.
                self._client.xack(REGISTRY.jobs, REGISTRY.workers, entry)
                continue
            pending: Any = self._client.xpending_range(
                REGISTRY.jobs, REGISTRY.workers, entry, entry, 1
            )
            attempt = max(2, int(pending[0]["times_delivered"]) if pending else 2)
            _log.warning("took over a job of a lost worker (attempt %d)", attempt)
            self.meter.count("taken_over")
            return _Job(entry, plain(fields), attempt)
        # There may be more after one, so the clock starts only when none is left.
        self._claimed = now
        self._forget_dead()
        return None

    def _forget_dead(self) -> None:
        """Remove workers that hold no job and show no sign of life from the group."""
        consumers: Any = self._client.xinfo_consumers(REGISTRY.jobs, REGISTRY.workers)
        for one in consumers:
            name = text(one["name"])
            if one["pending"] or name == self.name or self._client.exists(process_key(name)):
                continue
            self._forget(keys=[REGISTRY.jobs], args=[REGISTRY.workers, name])

    def _renew(self) -> None:
        """Renew the claims on our jobs. The heartbeat's thread calls this."""
        for entry in list(self._held):
            self._keep(keys=[REGISTRY.jobs], args=[REGISTRY.workers, self.name, entry])

    # Decoding

    def _decode(self, job: _Job) -> None:
        """Set the job's result."""
        job.started = time.monotonic()
        try:
            if job.attempt > self._terms.attempts:
                job.dead = (
                    f"{self._terms.attempts} workers had this job and ended, were lost or could "
                    "not write its result; it is not tried again: look at their logs and at its "
                    f"logits, which are kept in the stream {REGISTRY.dead}"
                )
                raise ProtocolError(job.dead)
            job.result = self._search_job(job)
        except UserError as error:
            self._refuse(job, str(error))
        except Exception as error:
            self._failed(job, error)
            self._use(self._settings, self._hot_words)

    def _failed(self, job: _Job, error: Exception) -> None:
        """Refuse a job after a fault of ours, which must not cost the other jobs their worker."""
        _log.error("failed on %s", job, exc_info=error)
        self.meter.count(f"failed_{type(error).__name__}")
        job.dead = f"the worker failed on it ({type(error).__name__}: {error}); see its log"
        self._refuse(job, job.dead)

    @staticmethod
    def _refuse(job: _Job, reason: str) -> None:
        job.result, job.warning = {"error": shortened(reason).encode()}, ""

    def _search_job(self, job: _Job) -> PendingAnswer:
        settings = self._settings_of(job)
        logits = logits_of(job.fields)
        words = self._hot_words
        if "hot_words" in job.fields:
            words = parse_hot_words(job.fields["hot_words"])
        if self._using != (settings, words):
            self._use(settings, words)
        check_length(len(logits), settings)
        until = time.thread_time() + self._terms.job_seconds
        work = self._searching(logits, settings, job.context)
        while True:
            self._heartbeat.alive(within=longest_finish(len(logits)))
            if time.thread_time() > until:
                raise ProtocolError(
                    f"the job took more than {self._terms.job_seconds:g} s of computing: lower "
                    "max_active or beam, or send shorter sentences"
                )
            try:
                next(work)
            except StopIteration as end:
                pending: PendingAnswer = end.value
                return pending

    def _searching(
        self, logits: np.ndarray, settings: Settings, context: str
    ) -> Sliced[PendingAnswer]:
        self._search.begin()
        for part in slices(logits, settings.max_active):
            self._search.step(part)
            yield
        hypotheses = self._search.finish()
        return (yield from self._answering.submitting(hypotheses, settings, context))

    def _use(self, settings: Settings, hot_words: Mapping[str, HotWord]) -> None:
        self._search: Search = self._model.search(settings, hot_words)
        self._using = (settings, hot_words)

    def _settings_of(self, job: _Job) -> Settings:
        """Return a job's settings. Note in it which of them have no effect here and why."""
        if "settings" not in job.fields:
            return self._settings
        if len(job.fields["settings"]) > MAX_JSON:
            raise ProtocolError(
                f"the job's settings have {len(job.fields['settings'])} bytes; at most {MAX_JSON} "
                "are possible: leave out what is no setting"
            )
        try:
            given = json.loads(job.fields["settings"], object_pairs_hook=unique)
            fields = {str(name): str(value).encode() for name, value in given.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                f"the job's settings are no JSON object ({error}): needed {{NAME: NUMBER}}"
            ) from error
        settings = changed_settings(self._settings, fields, self._ceilings, self._model.backend)
        idle = idle_settings(self._settings, settings, fields, self._model.backend)
        job.warning = "; ".join(idle)
        return settings

    # Answering

    def _send_ready(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            if isinstance(job.result, PendingAnswer):
                if not job.result.done():
                    return
                try:
                    job.result, left_out = final_fields(job.result.result(), job.context)
                    job.warning = "; ".join(filter(None, (job.warning, left_out)))
                except Exception as error:
                    self._failed(job, error)
            self._send(job)
            self._waiting.popleft()
            self._held.discard(job.id)
        self._busy(False)

    def _send(self, job: _Job) -> None:
        assert isinstance(job.result, dict)
        seconds = time.monotonic() - job.started
        # As the client sent it, in whatever encoding: it names the result.
        name = job.fields.get("job", b"")
        result = {
            "job": name,
            **job.result,
            **echoed(job.fields),
            "seconds": f"{seconds:.6f}".encode(),
            "worker": self.name.encode(),
            "attempt": str(job.attempt).encode(),
        }
        if job.warning:
            result["warning"] = job.warning.encode()
        try:
            check_job_name(name)
            keys = [REGISTRY.jobs, batch_key(job.of("batch")), results_stream(job.of("batch"))]
        except ProtocolError as error:
            # The job does not name its result, or the stream of it.
            _log.error("dropped a job: %s", error)
            self.meter.count("errors")
            with self._client.pipeline() as pipeline:
                letter: dict[Any, Any] = {**self._letter(job, str(error))}
                pipeline.xadd(REGISTRY.dead, letter, maxlen=KEPT, approximate=False)
                pipeline.xack(REGISTRY.jobs, REGISTRY.workers, job.id)
                pipeline.xdel(REGISTRY.jobs, job.id)
                pipeline.execute()
            return
        keys.append(REGISTRY.dead)
        letter = self._letter(job, job.dead) if job.dead else {}
        arguments: list[Any] = [REGISTRY.workers, job.id, name, JOB_SECONDS, KEPT, len(letter)]
        arguments += [*scripts.flat(letter), *scripts.flat(result)]
        try:
            written = self._finish(keys=keys, args=arguments)
        except redis.exceptions.ResponseError as error:
            if not wrong_type(error):
                raise
            if self._set_aside({keys[2]: "stream", keys[3]: "stream"}):
                self._send(job)
                return
            # Which jobs want a result stands in the batch's hash, and that cannot be read. The job
            # stays pending and is tried again after a lease.
            self.meter.count("errors")
            _log.error("%s: no result written: %s", job, error)
            return
        if not written:
            self.meter.count("unwanted")
            _log.info("%s had a result, or its client is gone", job)
        elif "error" in job.result:
            self.meter.count("errors")
            _log.warning("%s: %s", job, text(job.result["error"]))
        else:
            self.meter.count("sentences")
            self.meter.took("final", seconds)

    def _letter(self, job: _Job, reason: str) -> dict[str, bytes]:
        return dead_letter(self.name, REGISTRY.jobs, job.id, reason, job.fields)

    def _set_jobs_aside(self) -> bool:
        self._grouped = False
        return self._set_aside({REGISTRY.jobs: "stream"})

    def _set_aside(self, needed: Mapping[str, str]) -> bool:
        with contextlib.suppress(*LOST):
            return bool(set_aside(self._client, needed))
        return False

    def _wait_for_rescoring(self) -> None:
        if self._waiting and isinstance(self._waiting[0].result, PendingAnswer):
            self._waiting[0].result.wait(0.5)

    def _describe(self) -> dict[str, str]:
        return {"held_jobs": str(len(self._held))}
