"""Processes on this machine: how many cores there are, and what to do when a parent ends."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator


def version() -> str:
    """Version of the installed package; `unknown` where it is not installed but lies there."""
    try:
        return importlib.metadata.version("b2txt-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def default_workers() -> int:
    """Cores that this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )


def stop_with_parent(stop: threading.Event) -> None:
    """Sets `stop` when the process that started this one ends; insists if that does not help."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        stop.set()
        time.sleep(20.0)
        # A decode that never ends or a Redis that hangs must not keep us alive; the embedded Redis
        # goes with us.
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def cleaning_up_when_terminated() -> Iterator[None]:
    """SIGTERM ends the block by way of its clean-up, so that no half-written file stays."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
