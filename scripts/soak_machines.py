"""What the soak test runs: a small model, and the processes that it kills and starts again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis
from rich.console import Console

from lm_server.lm.build import build
from lm_server.protocol import LM_CLASSES, REGISTRY, SILENCE, encode_scoring
from lm_server.rescoring.ranking import ngram_answer
from lm_server.search.load import load_model
from lm_server.serving.embedded_redis import find_program
from lm_server.settings import Settings

AWAY = (redis.exceptions.RedisError, OSError)
_LEXICON = """a AH
and AH N D
bat B AE T
cat K AE T
dog D AO G
had HH AE D
hat HH AE T
mat M AE T
on AA N
ran R AE N
sat S AE T
saw S AO
the DH AH
to T UW
was W AA Z
"""
_TEXT = """The cat sat on the mat. The dog saw the cat. The dog ran to the cat, and the cat ran.
A cat had a hat and a dog ran to a hat. The bat was on the mat. The dog sat on the bat.
"""


@dataclass(frozen=True)
class Sentence:
    """Logits in the language model's order, and the offline decoder's answer to them."""

    logits: np.ndarray
    text: str
    scoring: str


def make_model(folder: Path) -> Path:
    """Build a small model, so that ten thousand sentences take minutes."""
    (folder / "lexicon.txt").write_text(_LEXICON)
    (folder / "text.txt").write_text(_TEXT * 30)
    with open(os.devnull, "w") as quiet:
        build(
            [folder / "text.txt"],
            3,
            folder / "lexicon.txt",
            folder / "lm",
            Console(file=quiet),
        )
    return folder / "lm"


def make_sentences(model: Path, count: int, rng: np.random.Generator) -> list[Sentence]:
    """Make noisy logits of random sentences and decode them offline."""
    said = {line.split()[0]: line.split()[1:] for line in _LEXICON.splitlines()}
    search = load_model(model).search(Settings())
    found = []
    for _ in range(count):
        words = rng.choice(list(said), size=rng.integers(1, 6))
        classes = [name for word in words for name in [*said[word], SILENCE]]
        rows = [c for name in classes for c in (LM_CLASSES.index(name), 0)]
        logits = rng.normal(0.0, 1.5, (len(rows), len(LM_CLASSES)))
        logits[np.arange(len(rows)), rows] += 6.0
        logits = logits.astype(np.float32)
        search.begin()
        search.step(logits)
        answer = ngram_answer(search.finish(), search.settings)
        found.append(Sentence(logits, answer.sentence, encode_scoring(answer.hypotheses)))
    return found


class Machines:
    """Redis, server and workers: real processes that are killed and started again."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.url = f"unix://{folder / 'redis.sock'}"
        self.client = redis.Redis.from_url(self.url, protocol=2)
        self._log = (folder / "log.txt").open("ab")
        self.redis = self._start_redis()
        self.server = self._start("serve", "--grace-seconds", "1")
        self.workers = [
            self._start("worker", "--workers", "1", "--lease-seconds", "2") for _ in range(2)
        ]
        for process in (self.server, *self.workers):
            self._ready(process)
        self._abandoned: list[tuple[str, str]] = []

    def _start_redis(self) -> subprocess.Popen[bytes]:
        options = ["--port", "0", "--unixsocket", str(self.folder / "redis.sock"), "--save", ""]
        # With everysec, Redis answers up to two seconds before it writes. A kill in that time takes
        # back what it had answered.
        options += ["--appendonly", "yes", "--appendfsync", "always", "--dir", str(self.folder)]
        process = subprocess.Popen([find_program(), *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client.ping()
                return process
            except AWAY:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _start(self, command: str, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "lm_server", command, "--lm", str(self.model)),
                *("--redis", self.url, "--exit-with-parent", *options),
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def _ready(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith(b"lm-server ready"):
            raise RuntimeError(f"a process did not start; see {self.folder / 'log.txt'}")

    def kill_redis(self) -> None:
        """Kill Redis and start it again on its file."""
        self.redis.kill()
        self.redis.wait()
        time.sleep(0.3)
        self.redis = self._start_redis()

    def kill_server(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Kill the server, do something without one, and start another."""
        self.server.kill()
        self.server.wait()
        meanwhile()
        self.server = self._start("serve", "--grace-seconds", "1")
        self._ready(self.server)

    def kill_worker(self) -> None:
        """Kill a worker that holds a job, which another one must take over then."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                for entry, name in self._held():
                    pid = _pid(name)
                    with contextlib.suppress(ProcessLookupError):
                        # Stopped first, to be sure that it dies with the job in its hands.
                        os.kill(pid, signal.SIGSTOP)
                        try:
                            while _state(pid) not in ("T", "Z", ""):
                                time.sleep(0.001)
                            # Twice: a result that it sent before the stop is written by the second
                            # time, because Redis reads all its connections in turn.
                            if all((entry, name) in self._held() for _ in range(2)):
                                os.kill(pid, signal.SIGKILL)
                                self._abandoned.append((entry, name))
                                return
                        finally:
                            os.kill(pid, signal.SIGCONT)
            except AWAY:
                pass
            time.sleep(0.002)
        raise RuntimeError(f"no worker had a job for 30 s; see {self.folder / 'log.txt'}")

    def taken_over(self) -> int:
        """Return how many jobs of killed workers went to another worker."""
        pending = self._pending()
        return sum(one not in pending for one in self._abandoned)

    def _held(self) -> list[tuple[str, str]]:
        """Return entry and worker of each job in the hands of a living process."""
        return [
            (entry, name) for entry, name in self._pending() if _state(_pid(name)) not in ("", "Z")
        ]

    def _pending(self) -> list[tuple[str, str]]:
        try:
            found: Any = self.client.xpending_range(
                REGISTRY.jobs, REGISTRY.workers, "-", "+", count=100
            )
        except redis.exceptions.ResponseError:
            return []
        return [(one["message_id"].decode(), one["consumer"].decode()) for one in found]

    def stop(self) -> None:
        """End all processes in order."""
        for process in (self.server, *self.workers):
            process.terminate()
        for process in (self.server, *self.workers):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()
            process.wait()
        self.client.close()
        self.redis.terminate()
        self.redis.wait()
        self._log.close()


def _pid(worker: str) -> int:
    return int(worker.split("-")[-2])


def _state(pid: int) -> str:
    """Return the state letter of a process, `T` for a stopped one, empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
