"""This process: its version, its cores, and how it ends.

A command ends at an error, at Ctrl-C, at a signal, with its parent, or when the reader of its
output has gone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from lm_server.errors import UserError

_STOP_SECONDS = 20.0
_PATIENCE = 5.0
"""Seconds in which the main thread must notice an interrupt."""
_ONE_PRESS = 0.3
"""Signals within so many seconds are one Ctrl-C: some launchers forward what the terminal sends."""
_INTERRUPTED, _PIPE_CLOSED = 130, 141  # as shells report SIGINT and SIGPIPE
_SHOW_CURSOR = b"\x1b[?25h"
_LOGIN = re.compile(r"\S*(:/|@)\S*")
"""A word of a command line that may be a URL with a password."""
_OPTION = re.compile(r"^--[\w.-]+=")
_finishing: list[str] = []


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors repeat no URL or login among the arguments."""

    def error(self, message: str) -> NoReturn:
        """Exit with an error in which words that may hold a password are masked."""
        super().error(_LOGIN.sub("***", message))


def exit_status(run: Callable[[], int]) -> int:
    """Return the exit status of a command. An error that a user can repair is one line."""
    try:
        with _interrupts_acknowledged():
            status = run()
            sys.stdout.flush()
    except KeyboardInterrupt:
        # A second Ctrl-C while Python ends would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return _INTERRUPTED
    except (UserError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            # Python flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return _PIPE_CLOSED
        print(f"error: {_without_logins(str(error)) or 'memory ran out'}", file=sys.stderr)
        return 2
    return status


def _without_logins(message: str) -> str:
    """Mask the command's arguments that may hold a password, where a message repeats them.

    A URL in the place of a path is repeated as `redis:/`, and one in an option's value without it.
    A URL without a login stays: it is what the message is about.
    """
    for word in " ".join(sys.argv[1:]).split():
        value = _OPTION.sub("", word)
        if "@" in value:
            for form in (value, os.path.normpath(value)):
                message = message.replace(form, "***")
    return message


def leave(status: int) -> NoReturn:
    """End the process without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _reader_has_gone() -> bool:
    """Return whether standard output is a pipe that nobody reads, as after `| head`."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


@contextlib.contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once inside the block. Imports have nothing to clean up."""
    if not _interrupts_raise():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def finishing(what: str) -> Iterator[None]:
    """Name what an interrupt inside the block waits for."""
    _finishing.append(what)
    try:
        yield
    finally:
        _finishing.remove(what)


def _interrupts_raise() -> bool:
    """Return whether Ctrl-C raises KeyboardInterrupt here, and not what a caller chose."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextlib.contextmanager
def _interrupts_acknowledged() -> Iterator[None]:
    """Acknowledge Ctrl-C in the block within moments, whatever the main thread is busy with.

    Python runs a signal's handler in the main thread, which a compiler or a large file may keep
    busy for minutes. The signal's number is written to a pipe at once, which a thread reads.
    """
    if not _interrupts_raise():
        yield
        return
    raised = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        raised.set()
        raise KeyboardInterrupt

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=_watch, args=(reading, raised, interrupt), daemon=True)
    watcher.start()
    signal.signal(signal.SIGINT, interrupt)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(writing)  # which ends the thread
        watcher.join(1.0)
        os.close(reading)


def _watch(reading: int, raised: threading.Event, ours: Callable[..., None]) -> None:
    """Answer interrupts: the first by a line, the second, or one without effect, by an end."""
    last: float | None = None
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            if not raised.is_set():
                _end("it cannot be stopped: ended without it")
            _say("still cleaning up; Ctrl-C again ends at once")
            deadline = None
            continue
        found = os.read(reading, 64)
        if not found:
            return
        now = time.monotonic()
        if signal.SIGINT not in found or (last is not None and now - last < _ONE_PRESS):
            continue
        if last is not None:
            _end("ended at once")
        last = now
        after = f" after {_finishing[-1]}" if _finishing else ""
        _say(f"stopping{after}; Ctrl-C again ends at once")
        # A command with a handler of its own ends when its work is safe.
        if signal.getsignal(signal.SIGINT) is ours:
            deadline = now + _PATIENCE


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\ninterrupted: {text}\n".encode())


def _end(text: str) -> NoReturn:
    _say(text)
    if os.isatty(2):
        os.write(2, _SHOW_CURSOR)  # progress bars hide it
    os._exit(_INTERRUPTED)


def _forget_in_child() -> None:
    # A forked process must not write its signals into its parent's pipe.
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)


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


def end_with_parent(parent: int) -> None:
    """Have this worker of a pool killed when the process `parent` is (on Linux).

    A worker waits on a pipe that its siblings hold open too, so that none of them would see the
    parent's end.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


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
