"""Worker processes: forked from one that has the model in memory, started again when they end."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from lm_server.errors import UserError

_STOP_SECONDS = 15.0
_SOON_SECONDS = 5.0
_MOST_SOON = 10

_log = logging.getLogger(__name__)
Busy = Callable[[bool], None]
"""Called by a process with True when it takes up a job, and with False when it has none."""


class WorkersError(UserError, RuntimeError):
    """The worker processes end again and again, or cannot start."""


def supervise(
    work: Callable[[threading.Event, Busy], None],
    count: int,
    stop: threading.Event,
    check: Callable[[], None] = lambda: None,
    watch: Callable[[threading.Event], None] | None = None,
) -> None:
    """Run `count` processes of `work` until `stop` is set. Start another for each that ends.

    Args:
      work: runs in each process until its event is set. A UserError in one ends all of them. The
        death of a process that is busy is its job's fault, and does not count.
      count: number of processes.
      stop: ends them in order.
      check: called several times per second. May raise to end them.
      watch: called once with `stop`, after the first processes were forked. May start threads.

    Raises:
      WorkersError: a process could not start, or they end as soon as they start.
    """
    started: dict[int, float] = {}
    jobs: dict[int, mmap.mmap] = {}
    soon = 0

    def start() -> None:
        # Shared with the process: what it wrote is there after its death, however it died.
        mark = mmap.mmap(-1, 1)
        pid = _fork(work, mark)
        started[pid], jobs[pid] = time.monotonic(), mark

    try:
        for _ in range(count):
            start()
        if watch is not None:
            watch(stop)
        while not stop.wait(0.1):
            check()
            for pid in list(started):
                found, status = os.waitpid(pid, os.WNOHANG)
                if not found:
                    continue
                lived = time.monotonic() - started.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                with jobs.pop(pid) as mark:
                    busy = mark[0] == 1
                if code == 2 and not busy:
                    raise WorkersError("a worker could not start; the reason is above")
                if not busy:
                    soon = soon + 1 if lived < _SOON_SECONDS else 0
                if soon > _MOST_SOON:
                    raise WorkersError(
                        f"workers ended {soon} times within {_SOON_SECONDS:g} s of their start, "
                        f"the last with exit code {code}: look at the log"
                    )
                doing = "in a job" if busy else "without a job"
                _log.error("worker %d ended %s, exit code %d; starting another", pid, doing, code)
                start()
    finally:
        _stop(list(started))


def _fork(work: Callable[[threading.Event, Busy], None], mark: mmap.mmap) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        stop = threading.Event()
        # Ctrl-C reaches the parent too, which then ends us in order.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() == parent:
            work(stop, lambda busy: mark.__setitem__(0, int(busy)))
        code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        _log.exception("a worker failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Nothing of the parent's (its Redis, its temporary folders) is ours to clean up.
        os._exit(code)


def _stop(processes: list[int]) -> None:
    for pid in processes:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while processes and time.monotonic() < deadline:
        processes = [pid for pid in processes if not os.waitpid(pid, os.WNOHANG)[0]]
        time.sleep(0.02)
    for pid in processes:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
