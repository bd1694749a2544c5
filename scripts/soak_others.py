"""Faults of the soak test by others: an absent server, foreign keys, a second client."""

from __future__ import annotations

import time
from typing import Any

from soak_clients import ANSWER_SECONDS, Tally, request
from soak_machines import Machines, Sentence

from lm_server.protocol import REGISTRY, encode_logits, owner_key, session_streams, state_key


class _Voice:
    """A client of one session that waits for each answer."""

    def __init__(self, machines: Machines, session: str, tally: Tally) -> None:
        self.redis: Any = machines.client
        self.session, self.names, self._tally = session, session_streams(session), tally
        self._seen = {self.names.final: "0-0", self.names.error: "0-0", self.names.partial: "0-0"}

    def send(self, sentence: Sentence, begin: int, end: int | None, **fields: str) -> None:
        """Send frames of a sentence. No answer is waited for."""
        payload = {"logits": encode_logits(sentence.logits[begin:end]), **fields}
        self.redis.xadd(self.names.input, payload)
        time.sleep(0.002)

    def end(self, **fields: str) -> None:
        """End the sentence."""
        self.redis.xadd(self.names.finalize, {"done": 0, **fields})
        time.sleep(0.002)

    def wait(self, stream: str, what: str) -> dict[bytes, bytes]:
        """Return the next entry of a stream. Without one, count it as lost."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            for _, entries in self.redis.xread({stream: self._seen[stream]}, count=1, block=500):
                self._seen[stream], fields = entries[0]
                return dict(fields)
        self._tally.count("lost", f"{what} in session {self.session!r}")
        return {}

    def refused(self, words: str) -> None:
        """Wait for an error with these words."""
        if words in self.wait(self.names.error, words).get(b"error", b"").decode():
            self._tally.count("refusals")
        else:
            self._tally.count("refusals lost", f"{words} in session {self.session!r}")

    def answered(self, sentence: Sentence) -> None:
        """Wait for the right answer, then close the session. It is the only answer."""
        found = self.wait(self.names.final, "the answer").get(b"scoring", b"").decode()
        self._tally.count("real-time sentences")
        if found != sentence.scoring or self.redis.xlen(self.names.final) != 1:
            self._tally.count("wrong", f"in session {self.session!r}")
        request(self.redis, "close", self.session)


def server_away(machines: Machines, number: int, sentence: Sentence, tally: Tally) -> None:
    """Have no server until a session's state has expired, in the middle of its sentence."""
    voice = _Voice(machines, f"away-{number}", tally)
    half = len(sentence.logits) // 2
    request(voice.redis, "open", voice.session)
    voice.send(sentence, 0, half)
    voice.wait(voice.names.partial, "the partial answer")
    keys = state_key(voice.session), owner_key(voice.session)
    machines.kill_server(meanwhile=lambda: voice.redis.delete(*keys))
    voice.send(sentence, half, None)
    voice.end()
    for words in ("no server was there for it", *3 * ("the beginning of this sentence is lost",)):
        voice.refused(words)
    voice.send(sentence, 0, None)
    voice.end()
    voice.answered(sentence)


def foreign_keys(machines: Machines, number: int, sentence: Sentence, tally: Tally) -> None:
    """Write what no server writes, and speak in a session of which that is known."""
    voice = _Voice(machines, f"foreign-{number}", tally)
    voice.redis.set(owner_key(voice.session), "nobody")
    voice.redis.hset(state_key(voice.session), voice.names.input, "no id")
    for name, value in (("../../etc", "x"), (voice.session, "{}")):
        voice.redis.hset(REGISTRY.sessions, name, value)
    for key in voice.redis.keys("remote_lm_wake:*"):
        voice.redis.set(key, "no stream")
    for words in ("send them again", "held what no server wrote"):
        voice.refused(words)
    voice.redis.xadd(voice.names.reset, {"done": 0})
    time.sleep(0.002)
    voice.send(sentence, 0, None)
    voice.end()
    voice.answered(sentence)
    if voice.redis.hexists(REGISTRY.sessions, "../../etc"):
        tally.count("sessions left open", "../../etc")


def second_client(machines: Machines, number: int, sentence: Sentence, tally: Tally) -> None:
    """Speak into the sentence of a client that has named itself."""
    voice = _Voice(machines, f"two-{number}", tally)
    request(voice.redis, "open", voice.session)
    half = len(sentence.logits) // 2
    voice.send(sentence, 0, half, client="first")
    voice.send(sentence, 0, half, client="second")
    voice.end()
    for _ in range(2):
        voice.refused("this session is in use by the client 'first'")
    voice.send(sentence, half, None, client="first")
    voice.end(client="first")
    voice.answered(sentence)
