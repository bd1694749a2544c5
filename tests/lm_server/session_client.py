"""A client of one session, written from docs/protocol.md and not from our own client."""

import time

import numpy as np
from small_model import say

REGISTRY, ANSWERS = "remote_lm_sessions", "remote_lm_sessions_answer"


def ask(connection, action, session=None, seconds=120.0, **fields):
    """Sends a request and gives its answer's fields."""
    newest = connection.xrevrange(ANSWERS, count=1)
    position = newest[0][0] if newest else b"0-0"
    given = {"action": action, **fields} | ({} if session is None else {"session": session})
    mark = f"{action}-{session}-{np.random.default_rng().integers(1 << 60)}".encode()
    connection.xadd(REGISTRY, {**given, "request_id": mark})
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for _, entries in connection.xread({ANSWERS: position}, block=1000):
            for id_, answer in entries:
                position = id_
                if answer.get(b"request_id") == mark:
                    return {key.decode(): value.decode() for key, value in answer.items()}
    raise AssertionError(f"no answer to {given}")


class SessionClient:
    """Reads each answer stream from its start; an empty session is the default one."""

    def __init__(self, connection, session="", **settings):
        self.redis, self.session = connection, session
        self.seen = {}
        if session:
            self.opened = ask(connection, "open", session, **settings)

    def name(self, stream):
        return f"remote_lm_{stream}" + (f":{self.session}" if self.session else "")

    def add(self, stream, **fields):
        return self.redis.xadd(self.name(stream), fields).decode()

    def wait(self, stream, seconds=120.0):
        name = self.name(stream)
        deadline = time.monotonic() + seconds
        while not (found := self._read(name)) and time.monotonic() < deadline:
            pass
        assert found, f"nothing on {name} within {seconds} s"
        self.seen[name], fields = found[0][1][0]
        return {key.decode(): value.decode() for key, value in fields.items()}

    def _read(self, name):
        return self.redis.xread({name: self.seen.get(name, b"0-0")}, count=1, block=1000)

    def send(self, logits, **fields):
        return self.add("input", logits=np.float32(logits).tobytes(), **fields)

    def decode(self, words):
        self.add("reset", done=0)
        self.wait("done_resetting")
        self.send(say(words))
        self.wait("output_partial")
        self.add("finalize", done=0)
        final = self.wait("output_final")
        self.wait("done_finalizing")
        return final["lm_response_final"].split()
