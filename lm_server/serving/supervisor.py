"""Worker processes: forked from one that has the model in memory, started again when they end."""

from __future__ import annotations

import ctypes
import logging
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


class WorkersError(UserError, RuntimeError):
    """The worker processes end again and again, or cannot start."""


def supervise(
    work: Callable[[threading.Event], None],
    count: int,
    stop: threading.Event,
    check: Callable[[], None] = lambda: None,
    watch: Callable[[threading.Event], None] | None = None,
) -> None:
    """Run `count` processes of `work` until `stop` is set. Start another for each that ends.

    Args:
      work: runs in each process until its event is set. A UserError in one ends all of them.
      count: number of processes.
      stop: ends them in order.
      check: called several times per second. May raise to end them.
      watch: called once with `stop`, after the first processes were forked. May start threads.

    Raises:
      WorkersError: a process could not start, or they end as soon as they start.
    """
    started: dict[int, float] = {}
    soon = 0
    try:
        for _ in range(count):
            started[_fork(work)] = time.monotonic()
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
                if code == 2:
                    raise WorkersError("a worker could not start; the reason is above")
                soon = soon + 1 if lived < _SOON_SECONDS else 0
                if soon > _MOST_SOON:
                    raise WorkersError(
                        f"workers ended {soon} times within {_SOON_SECONDS:g} s of their start, "
                        f"the last with exit code {code}: look at the log"
                    )
                _log.error("worker %d ended with exit code %d; starting another", pid, code)
                started[_fork(work)] = time.monotonic()
    finally:
        _stop(list(started))


def _fork(work: Callable[[threading.Event], None]) -> int:
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
            work(stop)
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
