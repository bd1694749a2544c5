"""Decoding of many trials by many workers: jobs in, results out, in any order, each exactly once.

The other end are `lm-server worker` processes, on this machine or others (docs/protocol.md, Jobs).
A worker that ends, a connection that breaks and a Redis that restarts cost time, not results. What
has no result yet is submitted again, which changes nothing where the job is there already.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
from lm_server.client.client import Progress
from lm_server.client.connection import mask_password, redis_client, redis_errors
from lm_server.protocol import (
    JOB_SECONDS,
    REGISTRY,
    SUBMIT_JOB,
    Job,
    ProtocolError,
    batch_key,
    check_logits,
    process_key,
    results_stream,
    to_lm_order,
)

_AWAY = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)
_BLOCK_MS = 1000
_log = logging.getLogger(__name__)
_AHEAD = 256
"""Jobs submitted at a time: enough for many workers, some ten megabytes of Redis's memory."""


class JobClient:
    """A batch of jobs on a Redis that workers share. A context manager, or call `close`."""

    def __init__(
        self,
        url: str,
        timeout: float = 120.0,
        reconnect_seconds: float = 60.0,
        notice: Callable[[str], None] = _log.warning,
    ) -> None:
        """Connect to Redis.

        Args:
          url: Redis, for example `redis://:password@127.0.0.1:6379/0` or `unix:///run/redis.sock`.
          timeout: seconds without any result after which a worker must show a sign of life.
          reconnect_seconds: how long to wait for a Redis that went away.
          notice: called with a text when no worker is there to begin with.

        Raises:
          LanguageModelUnavailableError: no Redis answers at `url`, or it refuses the login.
          LanguageModelError: the URL is no Redis URL.
        """
        self.url = mask_password(url)
        self.batch = f"batch-{secrets.token_hex(8)}"
        self.duplicates = 0
        """Results that came a second time, which exactly-once delivery forbids."""
        self.foreign = 0
        """Entries among the results that belong to no job of this batch."""
        self._timeout, self._reconnect_seconds = timeout, reconnect_seconds
        self._notice = notice
        self._redis: Any = redis_client(url)
        self._submit = self._redis.register_script(SUBMIT_JOB)
        with redis_errors(self.url, "lm-server worker"):
            self._redis.ping()

    def __enter__(self) -> JobClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Withdraw the jobs without a result and close the connection."""
        # Should Redis be away, they expire by themselves.
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            self._redis.delete(batch_key(self.batch), results_stream(self.batch))
        self._redis.close()

    def decode_all(
        self,
        logits: Sequence[np.ndarray],
        names: Sequence[str],
        settings: Mapping[str, float] | None = None,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Decode trials. Return results in the order of the trials, a failed one with its reason.

        Args:
          logits: per trial [frames, 41] in the RNN's order.
          names: per trial, such as `t15.2023.08.13/trial_0007`.
          settings: such as acoustic_scale. The workers' own where a name is missing.
          progress: called after each result.

        Raises:
          LanguageModelUnavailableError: Redis stays away, or there is no worker.
          LanguageModelError: Redis refuses a command.
          ValueError: there are more names than trials, or fewer.
        """
        if len(logits) != len(names):
            raise ValueError(
                f"found {len(logits)} trials and {len(names)} names; needed one name each"
            )
        results: dict[int, Result] = {}
        jobs: dict[int, dict[str, bytes]] = {}
        for index, (frames, name) in enumerate(zip(logits, names, strict=True)):
            try:
                # A number before the name: two trials of one name are two jobs.
                job = Job(
                    self.batch, f"{index} {name}", to_lm_order(check_logits(frames)), settings
                )
                jobs[index] = job.fields()
            except ProtocolError as error:
                results[index] = Result(name, None, str(error), 0.0)
        with redis_errors(self.url, "lm-server worker"):
            self._run(jobs, names, results, len(names), progress)
        return [results[index] for index in range(len(names))]

    def _run(
        self,
        jobs: Mapping[int, dict[str, bytes]],
        names: Sequence[str],
        results: dict[int, Result],
        count: int,
        progress: Progress | None,
    ) -> None:
        waiting = deque(jobs)
        out: dict[int, None] = {}
        position, heard, away_since, looked = "0-0", time.monotonic(), None, False
        while waiting or out:
            try:
                while waiting and len(out) < _AHEAD:
                    self._send(jobs[waiting[0]])
                    out[waiting.popleft()] = None
                found = self._redis.xread(
                    {results_stream(self.batch): position}, count=_AHEAD, block=_BLOCK_MS
                )
                away_since = None
            except _AWAY as error:
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > self._reconnect_seconds:
                    raise LanguageModelUnavailableError(
                        f"Redis at {self.url} has been away for {self._reconnect_seconds:g} s "
                        f"({error}); {len(results)} of {count} trials have a result"
                    ) from error
                time.sleep(0.2)
                continue
            for _, entries in found:
                for id_, fields in entries:
                    position = id_
                    index = _index(fields)
                    if index is None or index not in jobs:
                        self.foreign += 1
                        continue
                    if index in results:
                        self.duplicates += 1
                        continue
                    results[index] = _result(names[index], fields)
                    out.pop(index, None)
                    heard = time.monotonic()
                    if progress is not None:
                        progress(len(results), count)
            if not found:
                position = self._look_for_losses(jobs, out, position)
                if not looked and not self._has_workers():
                    self._notice(
                        f"no worker shows a sign of life on {self.url} (one that still loads its "
                        f"model does not either): waiting {self._timeout:g} s for one; start "
                        "`lm-server worker --lm DIR --redis URL`"
                    )
                looked = True
                if time.monotonic() - heard > self._timeout:
                    if not self._has_workers():
                        raise LanguageModelUnavailableError(
                            f"no worker has answered for {self._timeout:g} s and none shows a sign "
                            f"of life on {self.url}; {len(results)} of {count} trials have a "
                            "result: start `lm-server worker --lm DIR --redis URL`"
                        )
                    heard = time.monotonic()

    def _send(self, job: Mapping[str, bytes]) -> None:
        flat = [part for pair in job.items() for part in pair]
        keys = [REGISTRY.jobs, batch_key(self.batch)]
        self._submit(keys=keys, args=[job["job"], JOB_SECONDS, *flat])

    def _look_for_losses(
        self, jobs: Mapping[int, dict[str, bytes]], out: Mapping[int, None], position: str
    ) -> str:
        """Submit again what a restarted Redis lost. Return the id to read results from."""
        try:
            if not out or self._redis.exists(batch_key(self.batch)):
                return position
            for index in out:
                self._send(jobs[index])
        except _AWAY:
            return position  # The loop meets the same error and waits.
        return "0-0"

    def _has_workers(self) -> bool:
        """Return whether a worker shows a sign of life, or Redis is away and cannot say."""
        try:
            return any(True for _ in self._redis.scan_iter(process_key("worker-*"), count=500))
        except _AWAY:
            return True


def _index(fields: Mapping[bytes, bytes]) -> int | None:
    """Return the number of the job that a result belongs to. None: no worker of ours wrote it."""
    number = fields.get(b"job", b"").split(b" ", 1)[0]
    return int(number) if number.isdigit() and len(number) < 20 else None


def _result(name: str, fields: Mapping[bytes, bytes]) -> Result:
    try:
        seconds = float(fields.get(b"seconds", b"0"))
    except ValueError:
        seconds = 0.0
    if b"error" in fields:
        return Result(name, None, error_text(fields), seconds)
    try:
        return Result(name, read_answer(fields), None, seconds)
    except LanguageModelError as error:
        return Result(name, None, str(error), seconds)
