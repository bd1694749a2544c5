"""The status that servers and workers write to Redis, and its reading for `lm-server status`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import resource
import secrets
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from lm_server.client.connection import LOST, plain, text
from lm_server.process import version
from lm_server.protocol import (
    DEFAULT_SESSION,
    PROTOCOL_VERSION,
    REGISTRY,
    is_session,
    owner_key,
    process_key,
)
from lm_server.serving.keys.key_types import set_aside, wrong_type

STUCK_SECONDS = 60.0
"""A main loop without a sign of life for so long counts as stuck."""
_STATUS_SECONDS = 15
"""A status is shown for so long after the last heartbeat."""
_FINISH_SECONDS_PER_FRAME = 1.0
"""Far more than the slowest search needs to end a sentence (0.1 s)."""
_KEPT = 4000
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper ends of the classes in which durations are counted (seconds). The last class has none."""


def new_name(kind: str) -> str:
    """Return a unique name for this process: server-HOST-PID-RANDOM."""
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in platform.node())[:24]
    return f"{kind}-{host}-{os.getpid()}-{secrets.token_hex(3)}"


def longest_finish(frames: int) -> float:
    """Return the seconds that the end of a sentence of so many frames may take."""
    return _FINISH_SECONDS_PER_FRAME * frames


@dataclass(frozen=True)
class Report:
    """What operators are told of the processes of a command.

    Attributes:
      live: the main loop shows signs of life.
      ready: it is connected to Redis and answers clients.
      reason: a line about both.
      statuses: as in Redis, with the process's `name`.
      jobs: jobs that wait for any worker. None where that is not known.
    """

    live: bool
    ready: bool
    reason: str
    statuses: Sequence[Mapping[str, str]] = ()
    jobs: int | None = None


class Meter:
    """Counts of events and their durations. Threads may share it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._times: dict[str, deque[float]] = {}
        self._classes: dict[str, list[int]] = {}
        self._totals: dict[str, float] = {}
        self._lock = threading.Lock()

    def count(self, what: str, number: int = 1) -> None:
        """Add to a count."""
        with self._lock:
            self.counts[what] += number

    def took(self, what: str, seconds: float) -> None:
        """Record one duration. The last 4000 of each kind are kept."""
        with self._lock:
            self._times.setdefault(what, deque(maxlen=_KEPT)).append(seconds)
            classes = self._classes.setdefault(what, [0] * (len(BUCKETS) + 1))
            classes[bisect_left(BUCKETS, seconds)] += 1
            self._totals[what] = self._totals.get(what, 0.0) + seconds

    def failures(self) -> dict[str, int]:
        """Return the number of our own faults so far, by the exception's name."""
        with self._lock:
            return {
                name.removeprefix("failed_"): number
                for name, number in self.counts.items()
                if name.startswith("failed_")
            }

    def summary(self) -> dict[str, str]:
        """Return counts, and p50, p99 and maximum of each kind of duration in milliseconds, with
        the numbers in `BUCKETS` and the sum of all."""
        with self._lock:
            found = {name: str(value) for name, value in self.counts.items()}
            for name, classes in self._classes.items():
                found[f"{name}_histogram"] = json.dumps([classes, self._totals[name]])
            times = {name: sorted(values) for name, values in self._times.items()}
        for name, values in times.items():
            for label, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
                found[f"{name}_ms_{label}"] = f"{1000 * percentile(values, share):.2f}"
        return found


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the ordered values lie (nearest rank)."""
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def memory_megabytes() -> float:
    """Return this process's memory in MB: its present one on Linux, elsewhere its peak."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class Heartbeat:
    """A thread that writes this process's status to Redis and renews what the process holds.

    It beats only while the main loop shows signs of life (`alive`). What a stuck process holds goes
    to another one.
    """

    def __init__(
        self,
        client: redis.Redis,
        name: str,
        kind: str,
        meter: Meter,
        describe: Callable[[], Mapping[str, str]],
        renew: Callable[[], None],
        seconds: float = 1.0,
        stuck_seconds: float = STUCK_SECONDS,
    ) -> None:
        """Prepare. The beat begins with the `with` block.

        Args:
          client: connection to Redis.
          name: of the process.
          kind: "server" or "worker".
          meter: counts and durations for the status.
          describe: returns further fields of the status.
          renew: renews what the process holds. Called before every status.
          seconds: time between two beats.
          stuck_seconds: time after a sign of life at which the beat ends.
        """
        self._seconds, self._stuck_seconds = seconds, stuck_seconds
        self._client, self._name, self._meter = client, name, meter
        self._describe, self._renew = describe, renew
        self._fixed = {
            "kind": kind,
            "host": platform.node(),
            "pid": str(os.getpid()),
            "parent": str(os.getppid()),
            "version": version(),
            "protocol": PROTOCOL_VERSION,
            "started": f"{time.time():.3f}",
        }
        self._alive_until = time.monotonic() + stuck_seconds
        self._written = -math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        with contextlib.suppress(*LOST):
            self._client.delete(process_key(self._name))

    def alive(self, within: float = 0.0) -> None:
        """Show the main loop's sign of life. The next one may take up to `within` seconds."""
        self._alive_until = time.monotonic() + max(self._stuck_seconds, within)

    def report(self) -> Report:
        """Return this process's state for operators."""
        now = time.monotonic()
        live = now < self._alive_until
        ready = live and now - self._written < 5 * max(1.0, self._seconds)
        reason = "ready" if ready else "no connection to Redis" if live else "stuck"
        return Report(live, ready, reason, [{"name": self._name, **self._status()}])

    def _status(self) -> dict[str, str]:
        found = self._fixed | dict(self._describe()) | self._meter.summary()
        return found | {"memory_mb": f"{memory_megabytes():.1f}"}

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            if time.monotonic() < self._alive_until:
                self._beat()

    def _beat(self) -> None:
        try:
            self._renew()
            fields: dict[Any, Any] = dict(self._status())
            key = process_key(self._name)
            with self._client.pipeline() as pipeline:
                pipeline.hset(key, mapping=fields)
                pipeline.expire(key, _STATUS_SECONDS)
                pipeline.execute()
            self._written = time.monotonic()
        except LOST as error:
            # The main loop meets all others and logs them.
            if wrong_type(error):
                with contextlib.suppress(*LOST):
                    set_aside(self._client, {process_key(self._name): "hash"})


class _Reader:
    """Reads keys that anybody may have written, and keeps the names of those without use."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.unreadable: list[str] = []

    def read(self, command: Callable[[str], Any], key: str) -> Any:
        """Return the answer to a command on a key. None: the key holds another type."""
        try:
            return command(key)
        except redis.exceptions.ResponseError as error:
            if not wrong_type(error):
                raise
            self.unreadable.append(key)

    def processes(self) -> list[dict[str, str]]:
        """Return the statuses of all processes."""
        found = []
        for key in sorted(text(one) for one in self.client.scan_iter(process_key("*"), count=500)):
            fields = plain(self.read(self.client.hgetall, key))
            status = {name: text(value) for name, value in fields.items()}
            if _is_status(status):
                found.append({"name": key.removeprefix(process_key("")), **status})
            elif status:
                self.unreadable.append(key)
        return found


def gather(client: redis.Redis) -> dict[str, Any]:
    """Return what `lm-server status` shows: processes, sessions, jobs and Redis itself.

    Raises:
      RedisError: Redis cannot answer.
    """
    reader = _Reader(client)
    processes, read, unreadable = reader.processes(), reader.read, reader.unreadable
    opened = sorted(map(text, read(client.hkeys, REGISTRY.sessions) or []))
    unreadable += [f"{REGISTRY.sessions}: {name[:80]!r}" for name in opened if not is_session(name)]
    owners = {
        name or "(default)": read(client.get, owner_key(name))
        for name in (DEFAULT_SESSION, *filter(is_session, opened))
    }
    memory: Any = client.info("memory")
    server: Any = client.info("server")
    return {
        "processes": processes,
        "sessions": {name: owner and text(owner) for name, owner in owners.items()},
        "jobs": _jobs(client),
        "unreadable": unreadable,
        "redis": {
            "version": server.get("valkey_version") or server.get("redis_version"),
            "memory_mb": round(memory["used_memory"] / 1e6, 1),
        },
    }


def report_of_children(client: redis.Redis) -> Report:
    """Return the state of the worker processes that this process has started.

    Raises:
      RedisError: Redis cannot answer.
    """
    ours = (str(os.getpid()), platform.node())
    statuses = [
        one for one in _Reader(client).processes() if (one.get("parent"), one.get("host")) == ours
    ]
    reason = f"{len(statuses)} workers show signs of life"
    return Report(True, bool(statuses), reason, statuses, _jobs(client)["waiting"])


def _is_status(fields: Mapping[str, str]) -> bool:
    try:
        numbers = [float(fields[name]) for name in ("started", "memory_mb")]
    except (KeyError, ValueError):
        return False
    return "kind" in fields and all(map(math.isfinite, numbers))


def _jobs(client: redis.Redis) -> dict[str, int]:
    try:
        groups: Any = client.xinfo_groups(REGISTRY.jobs)
    except redis.exceptions.ResponseError:
        return {"in_stream": 0, "under_way": 0, "waiting": 0}
    length: Any = client.xlen(REGISTRY.jobs)
    total = int(length)
    pending = sum(int(one["pending"]) for one in groups)
    return {"in_stream": total, "under_way": pending, "waiting": total - pending}
