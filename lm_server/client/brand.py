"""The conventions of BRAND (Ali et al. 2024) for nodes: flags, parameters, states, entries.

A node is started with its nickname and the Redis of its graph. It finds its parameters in the
newest entry of `supergraph_stream`, writes its state to `NICKNAME_state`, and ends on SIGINT. An
entry has `ts` (monotonic ns), `sync` (JSON, copied from the input) and `i` (its number).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import redis

from lm_server.client.connection import LOST, connect, mask_password
from lm_server.errors import UserError

SUPERGRAPH = "supergraph_stream"
_WAIT_SECONDS = 10.0


class BrandError(UserError, ValueError):
    """A graph whose parameters do not fit, or whose Redis has gone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that BRAND's supervisor gives to every node."""
    parser.add_argument("-n", "--nickname", required=True, help="of the node in its graph")
    parser.add_argument(
        "-i",
        "--redis_host",
        default="127.0.0.1",
        metavar="HOST",
        help="of the graph's Redis (default 127.0.0.1)",
    )
    parser.add_argument(
        "-p", "--redis_port", type=int, default=6379, metavar="PORT", help="of it (default 6379)"
    )
    parser.add_argument("-s", "--redis_socket", metavar="PATH", help="used instead where given")


@dataclass
class Node:
    """A node of a running graph."""

    nickname: str
    url: str
    """Of the graph's Redis."""
    redis: redis.Redis
    _seen: str = "0-0"
    _numbers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Node:
        """Connect, and announce the node as BRAND's base class does.

        Raises:
          RedisUnavailableError: no Redis answers.
        """
        url = f"redis://{args.redis_host}:{args.redis_port}/0"
        if args.redis_socket:
            url = f"unix://{quote(args.redis_socket)}"
        node = cls(args.nickname, url, connect(url, _WAIT_SECONDS, threading.Event()))
        node.state("initialized")
        return node

    def state(self, status: str, code: int = 0, **more: str) -> None:
        """Add an entry to the state stream."""
        fields: dict[Any, Any] = {"code": code, "status": status, **more}
        self.redis.xadd(f"{self.nickname}_state", fields)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Add to the state stream how the block ends, if Redis still takes it.

        Raises:
          BrandError: an error of Redis came out of the block.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            with contextlib.suppress(*LOST):
                self.state("NODE_FATAL_ERROR", 1, message=f"{type(error).__name__}: {error}")
            if isinstance(error, redis.exceptions.RedisError):
                raise BrandError(
                    f"the graph's Redis at {mask_password(self.url)} does not answer as it should "
                    f"({error}); needed the one that BRAND's supervisor uses"
                ) from error
            raise
        finally:
            with contextlib.suppress(*LOST):
                self.state("NODE_SHUTDOWN")

    def parameters(self) -> dict[str, Any] | None:
        """Return the node's parameters, None where no newer supergraph has this node.

        Raises:
          BrandError: the newest entry is no supergraph.
        """
        entries: Any = self.redis.xrange(SUPERGRAPH, f"({self._seen}", "+")
        found = None
        for id_, fields in entries:
            self._seen = id_.decode()
            try:
                nodes = json.loads(fields[b"data"])["nodes"].values()
                mine = [one for one in nodes if one["nickname"] == self.nickname]
                if mine:
                    found = dict(mine[0].get("parameters") or {})
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise BrandError(
                    f"entry {self._seen} of {SUPERGRAPH} is no supergraph ({error!r}); needed the "
                    "field `data`, JSON with `nodes`"
                ) from error
        return found

    def first_parameters(self) -> dict[str, Any]:
        """Return the node's parameters and set the level of the log.

        Raises:
          BrandError: no supergraph has this node.
        """
        found = self.parameters()
        if found is None:
            raise BrandError(
                f"no entry of {SUPERGRAPH} has a node {self.nickname!r}; needed a graph with it: "
                "start the graph with BRAND's supervisor"
            )
        level = str(found.get("log", "INFO")).upper()
        if level not in logging.getLevelNamesMapping():
            raise BrandError(f"parameter log is {level!r}; needed INFO, DEBUG, WARNING or ERROR")
        logging.getLogger().setLevel(level)
        return found

    def add(self, stream: str, sync: bytes, number_in: int | None, **fields: bytes | str) -> None:
        """Add an entry to an output stream, stamped as BRAND's nodes do.

        Args:
          stream: its name.
          sync: of the input that the entry comes from, copied.
          number_in: the input's `i`.
          fields: the payload.
        """
        number = self._numbers.get(stream, 0)
        self._numbers[stream] = number + 1
        entry: dict[Any, Any] = {
            "ts": time.monotonic_ns().to_bytes(8, "little"),
            "sync": sync,
            "i": number.to_bytes(8, "little"),
        }
        if number_in is not None:
            entry["i_in"] = number_in.to_bytes(8, "little")
        entry.update(fields)
        self.redis.xadd(stream, entry)


def number_of(value: bytes | None) -> int | None:
    """Return an `i`: 8 bytes, little-endian, or text as older nodes write it.

    >>> number_of(b"\\x07" + bytes(7)), number_of(b"7"), number_of(None)
    (7, 7, None)
    """
    if not value:
        return None
    if value.isdigit():
        return int(value)
    return int.from_bytes(value, "little") if len(value) == 8 else None
