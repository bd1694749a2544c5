"""The soak test's clients: they say sentences, misbehave, vanish, and check every answer."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from soak_machines import AWAY, Sentence

from lm_server.client.answers import LanguageModelUnavailableError
from lm_server.client.jobs import JobClient
from lm_server.protocol import (
    REGISTRY,
    Job,
    batch_key,
    encode_logits,
    results_stream,
    session_streams,
    to_rnn_order,
)

ANSWER_SECONDS = 60.0
VANISHED_IDLE = 2
POISON = r'{"\ud800": {"weight": 50, "pronunciations": [["K"]]}}'
"""A hot word that no answer can carry."""
_BATCH = 50


@dataclass
class Tally:
    """What happened. Threads share it."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, detail: str = "") -> None:
        """Add one. The first fifty details are kept."""
        with self.lock:
            self.counts[what] += 1
            if detail and len(self.details) < 50:
                self.details.append(f"{what}: {detail}")

    def fault(self, kind: str) -> None:
        """Record a fault that took place."""
        with self.lock:
            self.faults[kind] += 1


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
        self.speaking = True

    def open(self) -> None:
        """Open the session."""
        if self.session:
            self._insist(lambda: request(self._redis, "open", self.session))

    def say(self, sentence: Sentence) -> None:
        """Send a sentence until it is accepted, and check its answer."""
        while True:
            self._number += 1
            mark = f"{self.session}-{self._number}"
            try:
                self._speak(sentence, mark)
                accepted = True
            except AWAY:
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
        """Misbehave in the middle of a sentence. An error must be the answer."""
        self.tally.fault(kind)
        if kind == "slow client":
            time.sleep(1.5)
            return
        stream = {
            "bad setting": self.names.update_params,
            "poison word": self.names.hot_words,
        }.get(kind, self.names.input)
        fields: dict[str, Any] = {
            "missing field": {"data": b"1234"},
            "wrong shape": {"logits": bytes(7 * 160 + 1)},
            "NaN": {"logits": np.full((5, 41), np.nan, np.float32).tobytes()},
            "oversized": {"logits": bytes(10_001 * 164)},
            "bad setting": {"beam": "wide", "nbest": "3"},
            "poison word": {"words": POISON},
            "huge name": {"n" * 5_000_000: "1"},
        }[kind]
        self._redis.xadd(stream, {**fields, "request_id": f"{mark}-bad"})
        if self._wait(self._errors, f"{mark}-bad") is None:
            self.tally.count("refusals lost", f"{kind}: {mark}")
        else:
            self.tally.count("refusals")

    def _wait(self, found: dict[str, Any], mark: str) -> Any:
        deadline = time.monotonic() + ANSWER_SECONDS
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
        """Read what comes late, and close the session."""
        self.speaking = False
        while self._insist(lambda: self._read(500)):
            pass
        if self.session:
            self._insist(lambda: request(self._redis, "close", self.session))
        self._redis.close()

    def _insist(self, action: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                return action()
            except AWAY:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def request(client: Any, action: str, session: str, **fields: Any) -> None:
    """Open or close a session. One that is open or closed already is accepted."""
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
    """Open a session, send half a sentence and leave it there."""
    with redis.Redis.from_url(url, protocol=2) as client:
        session = f"vanished-{number}"
        request(client, "open", session, idle_seconds=VANISHED_IDLE)
        half = encode_logits(sentence.logits[: len(sentence.logits) // 2])
        client.xadd(session_streams(session).input, {"logits": half})


def wrong_clock(url: str, number: int, sentence: Sentence, tally: Tally) -> None:
    """Send entries whose ids are of another time: long ago, or tomorrow."""
    session = f"clock-{number}"
    ms = 5 if number % 2 else int(1000 * (time.time() + 86_400))
    names = session_streams(session)
    with redis.Redis.from_url(url, protocol=2) as client:
        request(client, "open", session)
        client.xadd(names.reset, {"done": 0}, id=f"{ms}-1")
        client.xadd(names.input, {"logits": encode_logits(sentence.logits)}, id=f"{ms}-2")
        client.xadd(names.finalize, {"done": 0}, id=f"{ms}-3")
        fields = _first_entry(client, names.final)
        if fields is None:
            tally.count("lost", session)
            return
        tally.count("real-time sentences")
        if fields[b"scoring"].decode() != sentence.scoring:
            tally.count("wrong", session)
        request(client, "close", session)


def poison_job(url: str, number: int, sentence: Sentence, tally: Tally) -> None:
    """Submit a job that must be refused without harm to its worker."""
    batch = f"poison-{number}"
    with redis.Redis.from_url(url, protocol=2) as client:
        client.hset(batch_key(batch), "0", "queued")
        fields: dict[Any, Any] = {**Job(batch, "0", sentence.logits).fields(), "hot_words": POISON}
        client.xadd(REGISTRY.jobs, fields)
        found = _first_entry(client, results_stream(batch))
        if found and b"no single word" in found.get(b"error", b""):
            tally.count("refusals")
        else:
            tally.count("refusals lost", f"poison job: {found}")


def be_expensive(url: str, number: int, tally: Tally) -> None:
    """Open a session whose search is a hundred times slower, and use it beside the others."""
    session = f"expensive-{number}"
    names = session_streams(session)
    noise = np.random.default_rng(number).normal(0, 1, (200, 41)).astype(np.float32)
    with redis.Redis.from_url(url, protocol=2) as client:
        request(client, "open", session, max_active=5000, beam=1000, max_classes=41)
        client.xadd(names.input, {"logits": encode_logits(noise)})
        client.xadd(names.finalize, {"done": 0}, id=f"{int(1000 * time.time()) + 2}-0")
        if _first_entry(client, names.final) is None:
            tally.count("lost", session)
        request(client, "close", session)


def _first_entry(client: Any, stream: str) -> dict[bytes, bytes] | None:
    """Return the fields of a stream's first entry, None if none comes in time."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        if found := client.xread({stream: "0-0"}, block=500):
            return found[0][1][0][1]
    return None


def _job_client(url: str) -> JobClient:
    """Connect as soon as Redis is there. At the start of a batch it may just have been killed."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return JobClient(url, timeout=ANSWER_SECONDS, reconnect_seconds=60.0)
        except LanguageModelUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def do_jobs(url: str, sentences: Sequence[Sentence], count: int, spoken: int, tally: Tally) -> None:
    """Submit jobs, batch by batch, and check their results.

    Keep in step with the `spoken` sentences of the real-time clients, so that the workers are busy
    when they are killed.
    """
    done = 0
    while done < count:
        if done * spoken > (tally.counts["real-time sentences"] + _BATCH) * count:
            time.sleep(0.05)
            continue
        size = min(_BATCH, count - done)
        mine = [sentences[(done + i) % len(sentences)] for i in range(size)]
        logits = [to_rnn_order(one.logits) for one in mine]
        with _job_client(url) as client:
            told = 0

            def progress(number: int, _: int) -> None:
                nonlocal told
                for _i in range(number - told):
                    tally.count("jobs")
                told = number

            results = client.decode_all(logits, [str(i) for i in range(size)], None, progress)
            for one, result in zip(mine, results, strict=True):
                best = result.answer.sentence if result.answer else None
                if result.error is not None or best is None:
                    tally.count("lost", f"job {result.name}: {result.error}")
                elif best != one.text.strip():
                    tally.count("wrong", f"job {result.name}: {best!r} for {one.text!r}")
            for _i in range(client.duplicates):
                tally.count("duplicated", "job")
        done += size
