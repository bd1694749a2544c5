"""What a server or a worker needs of its Redis, checked at the start and named when it is refused.

A refusal for lack of rights does not go away by itself. Waiting for its end would be silence.
"""

from __future__ import annotations

import redis

from lm_server.client.connection import mask_password
from lm_server.errors import UserError
from lm_server.protocol import (
    CONTEXT_KEY,
    DEFAULT_SESSION,
    REGISTRY,
    attempts_key,
    batch_key,
    context_key,
    owner_key,
    process_key,
    results_stream,
    session_streams,
    state_key,
)
from lm_server.serving.keys.key_types import ASIDE

_LASTING = (
    *("NOPERM", "ACL failure in script", "The user executing the script can't"),
    *("unknown command", "Unknown Redis command", "CROSSSLOT", "MOVED"),
)
_SHOWN = 8
_SAMPLE = "rights"
"""Stands for the id of any session or batch."""

Command = tuple[str, ...]


class RightsError(UserError, RuntimeError):
    """Redis refuses what a process needs, and will go on doing so."""


def lasting(error: BaseException) -> bool:
    """Return whether Redis refused a command and will refuse it again, unlike in an outage."""
    if isinstance(error, redis.exceptions.NoPermissionError):
        return True
    return isinstance(error, redis.exceptions.ResponseError) and any(
        words in str(error) for words in _LASTING
    )


def check_rights(client: redis.Redis, url: str, needed: list[Command]) -> None:
    """Try commands that change nothing, because an argument is wrong or a key is not there.

    Args:
      client: connection to Redis.
      url: its URL, for the message.
      needed: of `server_needs` or `worker_needs`.

    Raises:
      RightsError: Redis refuses some of them.
    """
    with client.pipeline(transaction=False) as pipeline:
        for command in needed:
            pipeline.execute_command(*command)
        answers = pipeline.execute(raise_on_error=False)
    refused = [
        " ".join(command[:2])
        for command, answer in zip(needed, answers, strict=True)
        if isinstance(answer, redis.exceptions.ReadOnlyError) or lasting(answer)
    ]
    if refused:
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise RightsError(
            f"Redis at {mask_password(url)} refuses what lm-server needs: "
            f"{', '.join(refused[:_SHOWN])}{more}; needed a writable Redis, 6.2 or newer for "
            "workers, no cluster, and a user with the rights of docs/protocol.md (keys "
            f"~remote_lm_* and ~{CONTEXT_KEY}*): ask who looks after it for them"
        )


def server_needs(name: str, sessions: bool) -> list[Command]:
    """Return what a server of that name does. `sessions`: also those that clients open."""
    wake, requests, answers = f"remote_lm_wake:{name}", REGISTRY.requests, REGISTRY.answers
    opened, mark = REGISTRY.sessions, f"remote_lm_taken:{_SAMPLE}"
    needed = [*_needs_of_all(name), *_stream(wake), ("XREAD", "STREAMS", wake, "$")]
    needed += [*_stream(requests), ("XREAD", "STREAMS", requests, "$"), *_stream(answers)]
    needed += [("HGETALL", opened), ("HKEYS", opened), ("HGET", opened, ""), ("HDEL", opened, "")]
    needed += [("HEXISTS", opened, ""), ("HSET", opened, "a", "b", "c"), ("EXISTS", opened)]
    needed += [("GET", mark), ("SET", mark, "x", "EX")]
    for session in (DEFAULT_SESSION, _SAMPLE) if sessions else (DEFAULT_SESSION,):
        owner, state, names = owner_key(session), state_key(session), session_streams(session)
        context = context_key(session)
        needed += [("GETRANGE", context, "x", "x")]
        needed += [("GET", owner), ("SET", owner, "x", "PX")]
        attempts = attempts_key(session)
        needed += [("GET", attempts), ("SET", attempts, "x", "EX"), ("DEL", attempts)]
        needed += [("PTTL", owner), ("PEXPIRE", owner, "x"), ("EXISTS", owner)]
        needed += [("HGETALL", state), ("HGET", state, ""), ("HSET", state, "a", "b", "c")]
        needed += [("EXPIRE", state, "x")]
        for stream in vars(names).values():
            needed += _stream(stream)
        inputs = (names.reset, names.input, names.finalize, names.update_params, names.hot_words)
        needed += [("XREAD", "STREAMS", *inputs, *("$" for _ in inputs))]
        needed += [("XRANGE", names.input, "x", "x"), ("XLEN", names.args)]
    return [*needed, *_stream(REGISTRY.dead)]


def worker_needs(name: str) -> list[Command]:
    """Return what a worker of that name does."""
    jobs, group = REGISTRY.jobs, REGISTRY.workers
    batch, results = batch_key(_SAMPLE), results_stream(_SAMPLE)
    needed = [*_needs_of_all(name), *_stream(jobs), *_stream(results)]
    needed += [("XREADGROUP", "GROUP", group, name, "STREAMS", jobs, "x")]
    needed += [("XAUTOCLAIM", jobs, group, name, "x", "0"), ("XPENDING", jobs, group)]
    needed += [("XCLAIM", jobs, group, name, "x", "0-1"), ("XACK", jobs, group, "x")]
    needed += [("XGROUP CREATE", jobs, group, "x"), ("XGROUP DELCONSUMER", jobs, group, name)]
    needed += [("XINFO CONSUMERS", jobs, group), ("EXISTS", process_key(name))]
    needed += [("HGET", batch, ""), ("HSET", batch, "a", "b", "c"), ("EXPIRE", batch, "x")]
    return [*needed, *_stream(REGISTRY.dead)]


def _needs_of_all(name: str) -> list[Command]:
    own = process_key(name)
    needed = [("MULTI",), ("EXEC",), ("SCRIPT LOAD", "return 1"), ("EVALSHA", "0" * 40, "0")]
    needed += [("HSET", own, "a", "b", "c"), ("EXPIRE", own, "x"), ("DEL", own), ("TYPE", own)]
    # What sets keys of a wrong type aside.
    return [*needed, ("EXISTS", ASIDE + own), ("RENAME", own, ASIDE + own)]


def _stream(name: str) -> list[Command]:
    # An entry that is not added, since no length is called x.
    return [
        ("XADD", name, "MAXLEN", "x", "*", "a", "b"),
        ("XINFO STREAM", name),
        ("XTRIM", name, "MAXLEN", "x"),
        ("XDEL", name, "x"),
        ("EXPIRE", name, "x"),
    ]
