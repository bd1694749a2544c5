"""A language-model server of one's own: `lm-server` with its embedded Redis as a child."""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from lm_server.client.answers import LanguageModelUnavailableError
from lm_server.client.connection import mask_password

_READY = re.compile(r"lm-server ready redis=(\S+)")


@contextlib.contextmanager
def serve_child(
    lm_dir: str | Path,
    arguments: Sequence[str] = (),
    command: Sequence[str] = (sys.executable, "-m", "lm_server"),
    ready_timeout: float = 180.0,
    stop_timeout: float = 10.0,
    subcommand: str = "serve",
    redis: str | None = None,
) -> Iterator[str]:
    """Run `lm-server serve --lm DIR` with a Redis of its own, yield its URL, stop both.

    Should this process be killed, the child stops by itself (`--exit-with-parent`).

    Args:
      lm_dir: folder of a model, as `lm-server build --out` writes it.
      arguments: further arguments of `serve`, for example `("--beam", "300")`.
      command: how the server is started.
      ready_timeout: seconds until it must be ready. Loading a large model lasts a while.
      stop_timeout: seconds it has to stop before it is killed.
      subcommand: `serve`, or `worker` for jobs.
      redis: URL of a running Redis to use in place of its own. It is yielded then.

    Raises:
      LanguageModelUnavailableError: the server ended or was not ready in time. The message holds
        its stderr.
    """
    full = [
        *command,
        subcommand,
        "--lm",
        str(lm_dir),
        *(("--embedded-redis",) if redis is None else ("--redis", redis)),
        "--exit-with-parent",
        *arguments,
    ]
    # A session of its own keeps Ctrl-C with us (we stop the child in order) and lets us end all
    # that it started.
    child = subprocess.Popen(
        full,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert child.stdout is not None  # both are pipes
    assert child.stderr is not None
    ready: queue.Queue[str | None] = queue.Queue()
    written: collections.deque[str] = collections.deque(maxlen=50)
    # Both pipes are read to the end, or a talkative server would stand still on a full one.
    listeners = [
        threading.Thread(target=_find_ready, args=(child.stdout, ready), daemon=True),
        threading.Thread(target=written.extend, args=(child.stderr,), daemon=True),
    ]
    for listener in listeners:
        listener.start()
    try:
        try:
            url = ready.get(timeout=ready_timeout)
            found = "ended before it was ready"
        except queue.Empty:
            url, found = None, f"was not ready within {ready_timeout:g} s"
        if url is None:
            code = _stop(child, stop_timeout)
            for listener in listeners:
                listener.join(timeout=2.0)
            text = "".join(written).strip() or "(nothing)"
            shown = [mask_password(one) if one == redis else one for one in full]
            raise LanguageModelUnavailableError(
                f"the language-model server {found} (exit code {code}); "
                f"`{' '.join(shown)}` wrote:\n{text}"
            )
        # The line shows a URL without its password.
        yield redis or url
    finally:
        _stop(child, stop_timeout)
        for listener in listeners:
            listener.join(timeout=2.0)
        for stream in (child.stdout, child.stderr):
            with contextlib.suppress(OSError):
                stream.close()


def _find_ready(stdout: IO[str], ready: queue.Queue[str | None]) -> None:
    for line in stdout:
        match = _READY.match(line)
        if match:
            ready.put(match.group(1))
    ready.put(None)


def _stop(child: subprocess.Popen[str], timeout: float) -> int:
    """End the child and whatever it started. Return its exit code (negative: the signal)."""
    if child.poll() is None:
        child.terminate()
        deadline = time.monotonic() + timeout
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    # A server that was killed or crashed leaves its Redis behind, in the same process group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()
