"""Does anything get lost or answered twice when clients, workers, server and Redis misbehave?

    python scripts/soak.py [--sentences 10000] [--faults 50] [--seed 0] [--out DIR]

Starts, on this machine only, a Redis with an append-only file, one `lm-server serve`, and two
`lm-server worker`. Half of the sentences are spoken by real-time clients (one on the published
streams, the others in sessions), half are jobs. Meanwhile faults happen, in turns:

    missing field, wrong shape, NaN, worker killed, oversized, Redis killed, slow client,
    vanished client, clock, bad setting, server killed

Entries that cannot be used are sent in the middle of a sentence, which must not be harmed by them.
"Killed" is SIGKILL: Redis is started again on its file, a worker by its supervisor, the server by
this script. Every answer is compared with the offline decoder's, scores included. A client whose
own command to Redis fails does not know whether it was carried out; it gives that attempt up and
says the sentence again under another request id. An accepted sentence (Redis took its finalize)
without an answer is lost; a second answer to one request id is a duplicate.

Writes soak.json and soak.md into --out, prints the latter; exit code 1 if anything was lost,
doubled or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rich.console import Console
from rich.progress import Progress

from b2txt_jax.inference.lm_jobs import JobClient
from lm_server.answer import complete
from lm_server.build_lm import build
from lm_server.embedded_redis import find_program
from lm_server.protocol import (
    LM_CLASSES,
    REGISTRY,
    SILENCE,
    encode_logits,
    encode_scoring,
    process_key,
    session_streams,
    to_rnn_order,
)
from lm_server.search import load_model
from lm_server.settings import Settings

KINDS = (
    *("missing field", "wrong shape", "worker killed", "NaN", "Redis killed", "oversized"),
    *("slow client", "vanished client", "server killed", "clock", "bad setting"),
)
BY_CLIENT = ("missing field", "wrong shape", "NaN", "oversized", "slow client", "bad setting")
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
_ANSWER_SECONDS = 60.0
_AWAY = (redis.exceptions.RedisError, OSError)
_VANISHED_IDLE = 2
_BATCH = 50


@dataclass(frozen=True)
class Sentence:
    """Logits in the language model's order, and what the offline decoder makes of them."""

    logits: np.ndarray
    text: str
    scoring: str


@dataclass
class Tally:
    """What happened; threads share it."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, detail: str = "") -> None:
        """Adds one; the first fifty details are kept."""
        with self.lock:
            self.counts[what] += 1
            if detail and len(self.details) < 50:
                self.details.append(f"{what}: {detail}")

    def fault(self, kind: str) -> None:
        """Notes a fault that took place."""
        with self.lock:
            self.faults[kind] += 1


def make_model(folder: Path) -> Path:
    """A small model, so that ten thousand sentences take minutes."""
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
    """Noisy logits of random sentences, decoded offline."""
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
        answer = complete(search.finish(), search.settings)
        found.append(Sentence(logits, answer.sentence, encode_scoring(answer.scoring())))
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

    def _start_redis(self) -> subprocess.Popen[bytes]:
        options = ["--port", "0", "--unixsocket", str(self.folder / "redis.sock"), "--save", ""]
        # With everysec, Redis may answer up to two seconds before it writes, and a kill in that
        # time takes back what it had said.
        options += ["--appendonly", "yes", "--appendfsync", "always", "--dir", str(self.folder)]
        process = subprocess.Popen([find_program(), *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client.ping()
                return process
            except _AWAY:
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
        """Kills Redis and starts it again on its file."""
        self.redis.kill()
        self.redis.wait()
        time.sleep(0.3)
        self.redis = self._start_redis()

    def kill_server(self) -> None:
        """Kills the server and starts another."""
        self.server.kill()
        self.server.wait()
        self.server = self._start("serve", "--grace-seconds", "1")
        self._ready(self.server)

    def kill_worker(self) -> None:
        """Kills a worker that has a job at this moment."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                for name in self._busy():
                    pid = int(name.split("-")[-2])
                    with contextlib.suppress(ProcessLookupError):
                        # Stopped first, to be sure that it dies with the job in its hands.
                        os.kill(pid, signal.SIGSTOP)
                        time.sleep(0.01)
                        if name in self._busy():
                            os.kill(pid, signal.SIGKILL)
                            return
                        os.kill(pid, signal.SIGCONT)
            except _AWAY:
                pass
            time.sleep(0.002)
        raise RuntimeError(f"no worker had a job for 30 s; see {self.folder / 'log.txt'}")

    def _busy(self) -> list[str]:
        try:
            found: Any = self.client.xpending_range(
                REGISTRY.jobs, REGISTRY.workers, "-", "+", count=4
            )
        except redis.exceptions.ResponseError:
            return []
        # A dead worker's job waits for its lease; its process is no more.
        names = [one["consumer"].decode() for one in found]
        return [name for name in names if Path(f"/proc/{name.split('-')[-2]}").exists()]

    def stop(self) -> None:
        """Ends all processes in order."""
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


class Speaker:
    """A real-time client: says sentences and checks the answers."""

    def __init__(self, url: str, session: str, tally: Tally, seed: int) -> None:
        self.session, self.tally = session, tally
        self.names = session_streams(session)
        self.faults: queue.Queue[str] = queue.Queue()
        self._random = random.Random(seed)
        # Without retries: a command that failed may have been carried out.
        self._redis: Any = redis.Redis.from_url(
            url, protocol=2, socket_timeout=10.0, retry=Retry(NoBackoff(), 0)
        )
        self._seen = {self.names.final: "0-0", self.names.error: "0-0"}
        self._finals: Counter[str] = Counter()
        self._answers: dict[str, dict[bytes, bytes]] = {}
        self._errors: dict[str, str] = {}
        self._number = 0

    def open(self) -> None:
        """Has the session opened."""
        if self.session:
            self._insist(lambda: _request(self._redis, "open", self.session))

    def say(self, sentence: Sentence) -> None:
        """Says a sentence until it is accepted, and checks its answer."""
        while True:
            self._number += 1
            mark = f"{self.session}-{self._number}"
            try:
                self._speak(sentence, mark)
                accepted = True
            except _AWAY:
                accepted = False
                self.tally.count("attempts given up by their client")
                self._insist(self._redis.ping)
            if accepted:
                break
        answer = self._wait(self._answers, mark)
        if answer is None:
            self.tally.count("lost", f"{mark} in session {self.session!r}")
            return
        self.tally.count("real-time sentences")
        found = (answer[b"lm_response_final"].decode(), answer[b"scoring"].decode())
        if found != (sentence.text, sentence.scoring):
            self.tally.count("wrong", f"{mark}: {found[0]!r} for {sentence.text!r}")

    def _speak(self, sentence: Sentence, mark: str) -> None:
        chunks = np.array_split(sentence.logits, self._random.randint(1, 4))
        self._redis.xadd(self.names.reset, {"done": 0, "request_id": mark})
        # Ids of different streams within one millisecond have no order.
        time.sleep(0.002)
        for index, chunk in enumerate(chunks):
            if index == len(chunks) // 2 and not self.faults.empty():
                self._misbehave(self.faults.get(), mark)
            payload = {"logits": encode_logits(chunk), "request_id": mark}
            self._redis.xadd(self.names.input, payload)
        time.sleep(0.002)
        self._redis.xadd(self.names.finalize, {"done": 0, "request_id": mark})

    def _misbehave(self, kind: str, mark: str) -> None:
        """Does something wrong in the middle of a sentence; an error must be the answer."""
        self.tally.fault(kind)
        if kind == "slow client":
            time.sleep(1.5)
            return
        stream = self.names.update_params if kind == "bad setting" else self.names.input
        fields: dict[str, Any] = {
            "missing field": {"data": b"1234"},
            "wrong shape": {"logits": bytes(7 * 160 + 1)},
            "NaN": {"logits": np.full((5, 41), np.nan, np.float32).tobytes()},
            "oversized": {"logits": bytes(10_001 * 164)},
            "bad setting": {"beam": "wide", "nbest": "3"},
        }[kind]
        self._redis.xadd(stream, {**fields, "request_id": f"{mark}-bad"})
        if self._wait(self._errors, f"{mark}-bad") is None:
            self.tally.count("refusals lost", f"{kind}: {mark}")
        else:
            self.tally.count("refusals")

    def _wait(self, found: dict[str, Any], mark: str) -> Any:
        deadline = time.monotonic() + _ANSWER_SECONDS
        while mark not in found and time.monotonic() < deadline:
            self._insist(lambda: self._read(200))
        return found.pop(mark, None)

    def _read(self, block: int | None) -> bool:
        answer = self._redis.xread(self._seen, count=100, block=block)
        for name, entries in answer:
            stream = name.decode()
            for id_, fields in entries:
                self._seen[stream] = id_
                mark = fields.get(b"request_id", b"").decode()
                if stream == self.names.error:
                    self._errors[mark] = fields[b"error"].decode()
                    continue
                self._finals[mark] += 1
                self._answers[mark] = fields
                if self._finals[mark] > 1:
                    self.tally.count("duplicated", f"{mark} in session {self.session!r}")
        return bool(answer)

    def finish(self) -> None:
        """Looks for answers that nobody waits for any more, and closes the session."""
        while self._insist(lambda: self._read(500)):
            pass
        if self.session:
            self._insist(lambda: _request(self._redis, "close", self.session))
        self._redis.close()

    def _insist(self, action: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            try:
                return action()
            except _AWAY:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _request(client: Any, action: str, session: str, **fields: Any) -> None:
    """Opens or closes a session; one that is open already or closed already is no matter here."""
    mark = f"{action}-{session}-{time.monotonic_ns()}"
    given = {"action": action, "session": session, "request_id": mark, **fields}
    newest = client.xrevrange(REGISTRY.answers, count=1)
    position = newest[0][0] if newest else "0-0"
    client.xadd(REGISTRY.requests, given)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for _, entries in client.xread({REGISTRY.answers: position}, block=200):
            for id_, answer in entries:
                position = id_
                if answer.get(b"request_id") == mark.encode():
                    return
    raise redis.exceptions.TimeoutError(f"no answer to {action} {session}")


def vanish(url: str, number: int, sentence: Sentence) -> None:
    """A client that opens a session, says half a sentence and is not seen again."""
    with redis.Redis.from_url(url, protocol=2) as client:
        session = f"vanished-{number}"
        _request(client, "open", session, idle_seconds=_VANISHED_IDLE)
        half = encode_logits(sentence.logits[: len(sentence.logits) // 2])
        client.xadd(session_streams(session).input, {"logits": half})


def wrong_clock(url: str, number: int, sentence: Sentence, tally: Tally) -> None:
    """A client whose entries' ids are of another time: long ago, or tomorrow."""
    session = f"clock-{number}"
    ms = 5 if number % 2 else int(1000 * (time.time() + 86_400))
    names = session_streams(session)
    with redis.Redis.from_url(url, protocol=2) as client:
        _request(client, "open", session)
        client.xadd(names.reset, {"done": 0}, id=f"{ms}-1")
        client.xadd(names.input, {"logits": encode_logits(sentence.logits)}, id=f"{ms}-2")
        client.xadd(names.finalize, {"done": 0}, id=f"{ms}-3")
        found: Any = None
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not found and time.monotonic() < deadline:
            found = client.xread({names.final: "0-0"}, block=500)
        if not found:
            tally.count("lost", session)
            return
        fields = found[0][1][0][1]
        tally.count("real-time sentences")
        if fields[b"scoring"].decode() != sentence.scoring:
            tally.count("wrong", session)
        _request(client, "close", session)


def do_jobs(url: str, sentences: Sequence[Sentence], count: int, spoken: int, tally: Tally) -> None:
    """Hands in jobs, batch by batch, and checks their results; in step with the `spoken` sentences
    of the real-time clients, so that the workers are at work when they are killed."""
    done = 0
    while done < count:
        if done * spoken > (tally.counts["real-time sentences"] + _BATCH) * count:
            time.sleep(0.05)
            continue
        size = min(_BATCH, count - done)
        mine = [sentences[(done + i) % len(sentences)] for i in range(size)]
        logits = [to_rnn_order(one.logits) for one in mine]
        with JobClient(url, timeout=_ANSWER_SECONDS, reconnect_seconds=60.0) as client:
            told = 0

            def progress(number: int, _: int) -> None:
                nonlocal told
                for _i in range(number - told):
                    tally.count("jobs")
                told = number

            results = client.decode_all(logits, [str(i) for i in range(size)], None, progress)
            for one, result in zip(mine, results, strict=True):
                best = result.candidates[0].sentence if result.candidates else None
                if result.error is not None or best is None:
                    tally.count("lost", f"job {result.name}: {result.error}")
                elif best != one.text.strip():
                    tally.count("wrong", f"job {result.name}: {best!r} for {one.text!r}")
            for _i in range(client.duplicates):
                tally.count("duplicated", "job")
        done += size


def schedule(count: int, rng: random.Random) -> list[str]:
    """Kinds of faults, all of them equally often as far as possible."""
    kinds: list[str] = []
    while len(kinds) < count:
        some = list(KINDS)
        # The first round in the listed order, so that a short run has the most telling ones.
        if kinds:
            rng.shuffle(some)
        kinds += some
    return kinds[:count]


def soak(
    machines: Machines,
    sentences: Sequence[Sentence],
    total: int,
    faults: int,
    speakers: int,
    seed: int,
    tally: Tally,
) -> None:
    """Runs clients and faults until all sentences are said."""
    rng = random.Random(seed)
    names = ["", *(f"speaker-{i}" for i in range(1, speakers))]
    voices = [Speaker(machines.url, name, tally, seed + i) for i, name in enumerate(names)]
    jobs = total // 2
    shares = [(total - jobs) // speakers] * speakers
    shares[0] += total - jobs - sum(shares)

    def speak(index: int) -> None:
        voices[index].open()
        for number in range(shares[index]):
            voices[index].say(sentences[(7 * number + index) % len(sentences)])
        voices[index].finish()

    failures: list[BaseException] = []

    def guarded(action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                action()
            except BaseException as error:
                failures.append(error)
                raise

        return run

    actions: list[Callable[[], None]] = [lambda i=i: speak(i) for i in range(speakers)]  # type: ignore[misc]
    actions.append(lambda: do_jobs(machines.url, sentences, jobs, total - jobs, tally))
    threads = [threading.Thread(target=guarded(action), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    kinds = schedule(faults, rng)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sentences", total=total)
        number = 0
        while any(thread.is_alive() for thread in threads):
            done = tally.counts["real-time sentences"] + tally.counts["jobs"]
            progress.update(task, completed=done, description=f"sentences, {number} faults")
            if number < len(kinds) and done >= (number + 0.5) * total / (faults + 1):
                _inject(kinds[number], number, machines, voices, sentences, tally, rng)
                number += 1
            else:
                time.sleep(0.02)
    if failures:
        raise failures[0]
    if number < len(kinds):
        tally.count("faults that did not take place", f"{kinds[number:]}")
    # Those whose client vanished must be closed by now or soon.
    deadline = time.monotonic() + _VANISHED_IDLE + 20
    while machines.client.hlen(REGISTRY.sessions) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in machines.client.hkeys(REGISTRY.sessions):  # type: ignore[union-attr]
        tally.count("sessions left open", name.decode())


def _inject(
    kind: str,
    number: int,
    machines: Machines,
    voices: Sequence[Speaker],
    sentences: Sequence[Sentence],
    tally: Tally,
    rng: random.Random,
) -> None:
    if kind in BY_CLIENT:
        # The speaker notes it when it takes place.
        rng.choice(voices).faults.put(kind)
        return
    if kind == "Redis killed":
        machines.kill_redis()
    elif kind == "worker killed":
        machines.kill_worker()
    elif kind == "server killed":
        machines.kill_server()
    elif kind == "vanished client":
        vanish(machines.url, number, sentences[number])
    else:
        wrong_clock(machines.url, number, sentences[number], tally)
    tally.fault(kind)


def taken_over(client: Any) -> int:
    """Jobs that living workers took over from lost ones."""
    found = 0
    for key in client.scan_iter(process_key("worker-*")):
        found += int(client.hget(key, "taken_over") or 0)
    return found


def as_markdown(told: dict[str, Any]) -> str:
    """The summary as a table."""
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in told.items() if name != "faults"]
    lines += ["", "| Fault | Times |", "|---|---|"]
    lines += [f"| {kind} | {times} |" for kind, times in told["faults"].items()]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _running(folder: Path, model: Path) -> Iterator[Machines]:
    machines = Machines(folder, model)
    try:
        yield machines
    finally:
        machines.stop()


def main() -> int:
    """Runs and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=10_000, help="(default 10000)")
    parser.add_argument("--faults", type=int, default=50, help="(default 50)")
    parser.add_argument("--sessions", type=int, default=4, help="real-time clients (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="(default runs/soak)")
    args = parser.parse_args()
    tally = Tally()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lm-soak-") as temporary:
        folder = Path(temporary)
        model = make_model(folder)
        sentences = make_sentences(model, 211, np.random.default_rng(args.seed))
        with _running(folder, model) as machines:
            soak(
                machines,
                sentences,
                args.sentences,
                args.faults,
                args.sessions,
                args.seed,
                tally,
            )
            over = taken_over(machines.client)
    counts = tally.counts
    told = {
        "sentences": counts["real-time sentences"] + counts["jobs"],
        "real-time sentences": counts["real-time sentences"],
        "jobs": counts["jobs"],
        "injected faults": sum(tally.faults.values()),
        "lost answers": counts["lost"],
        "duplicated answers": counts["duplicated"],
        "wrong answers": counts["wrong"],
        "refusals of unusable entries": counts["refusals"],
        "refusals lost": counts["refusals lost"],
        "attempts given up by their client": counts["attempts given up by their client"],
        "jobs taken over by the workers living at the end": over,
        "sessions left open": counts["sessions left open"],
        "seconds": round(time.monotonic() - started, 1),
        "faults": dict(sorted(tally.faults.items())),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "soak.json").write_text(json.dumps(told, indent=1) + "\n")
    (args.out / "soak.md").write_text(as_markdown(told))
    print(as_markdown(told))
    for line in tally.details:
        print(line, file=sys.stderr)
    bad = ("lost", "duplicated", "wrong", "refusals lost", "sessions left open")
    return 1 if any(counts[name] for name in (*bad, "faults that did not take place")) else 0


if __name__ == "__main__":
    sys.exit(main())
