"""Real server processes, and what becomes of them."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from lm_server.serving.embedded_redis import find_program

ROOT = Path(__file__).parents[2]


@dataclass
class Running:
    """A server process that said it was ready."""

    process: subprocess.Popen[str]
    url: str
    line: str

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, protocol=2)


def start_server(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lm_server", "serve", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def wait_ready(process: subprocess.Popen[str], url: str | None = None) -> Running:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 120)[0], "no ready line within 120 s"
    line = process.stdout.readline()
    found = re.fullmatch(r"lm-server ready redis=(\S+) lm=(.+)\n", line)
    assert found, (line, process.stderr and process.stderr.read())
    return Running(process, url or found[1], line)


@contextlib.contextmanager
def serving(*arguments: str, url: str | None = None) -> Iterator[Running]:
    process = start_server(*arguments)
    try:
        yield wait_ready(process, url)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(stat[1]) == pid:
                    found.append(int(entry.name))
    return found


def start_redis(port: int, *options: str) -> tuple[subprocess.Popen[bytes], redis.Redis]:
    """A Redis of its own on a port, without persistence unless the options say otherwise."""
    arguments = ["--port", str(port), "--save", "", "--appendonly", "no", *options]
    process = subprocess.Popen([find_program(), *arguments], stdout=subprocess.DEVNULL)
    password = options[1] if "--requirepass" in options else None
    connection = redis.Redis(port=port, password=password, protocol=2)

    def up() -> bool:
        try:
            return bool(connection.ping())
        except (redis.exceptions.ConnectionError, redis.exceptions.BusyLoadingError):
            return False

    assert wait_until(up)
    return process, connection


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
