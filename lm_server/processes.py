"""This process: its version, its cores, and what happens at a signal or when its parent ends."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

_STOP_SECONDS = 20.0


def version() -> str:
    """Return the version of the installed package, or `unknown` in a checkout that is on the path
    only."""
    try:
        return importlib.metadata.version("b2txt-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def default_workers() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stop_with_parent(stop: threading.Event) -> None:
    """Set `stop` when the parent process ends, and exit if this process then takes too long."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        stop.set()
        time.sleep(_STOP_SECONDS)
        # A search that never ends or a Redis that hangs must not keep this process alive. The
        # embedded Redis ends with it.
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def cleaning_up_when_terminated() -> Iterator[None]:
    """Turn SIGTERM into an exception inside the block, so that no unfinished file stays."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
