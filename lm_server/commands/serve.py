"""Serves a model folder through Redis streams (docs/protocol.md) until SIGTERM or Ctrl-C.

Prints `lm-server ready redis=URL lm=DIR` on a line of standard output when it listens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from pathlib import Path
from types import FrameType

from lm_server import settings
from lm_server.processes import stop_with_parent

DEFAULT_URL = "redis://127.0.0.1:6379/0"


def add_redis_option(parser: argparse._ActionsContainer) -> None:
    """Adds --redis."""
    parser.add_argument(
        "--redis",
        default=os.environ.get("B2TXT_REDIS_URL", DEFAULT_URL),
        metavar="URL",
        help="redis://, rediss:// (TLS) or unix://, with user and password if need be "
        f"(default $B2TXT_REDIS_URL, else {DEFAULT_URL})",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--lm", type=Path, required=True, metavar="DIR", help="model folder")
    where = parser.add_mutually_exclusive_group()
    add_redis_option(where)
    where.add_argument(
        "--embedded-redis",
        action="store_true",
        help="start a Redis of our own and stop it at the end",
    )
    parser.add_argument(
        "--wait-seconds", type=float, default=10.0, help="wait for Redis at the start (default 10)"
    )
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="stop when the process that started us ends"
    )
    settings.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until told to stop."""
    from lm_server.beam_search import LanguageModel
    from lm_server.embedded_redis import RedisStartError, embedded_redis
    from lm_server.server import Server, connect, shown_url
    from lm_server.session import Session

    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    if args.exit_with_parent:
        stop_with_parent(stop)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(embedded_redis()) if args.embedded_redis else None
        url = own.url if own else args.redis
        chosen = settings.from_options(args)
        # Connecting first: a wrong URL shows at once, not after the model is read.
        client = stack.enter_context(connect(url, args.wait_seconds, stop))
        session = Session(LanguageModel(args.lm), chosen)
        server = Server(client, session, own=own is not None)

        def check() -> None:
            if own and not own.alive:
                raise RedisStartError(
                    f"the embedded Redis ended with exit code {own.process.returncode}"
                )

        print(f"lm-server ready redis={shown_url(url)} lm={args.lm}", flush=True)
        server.run(stop, check)
    return 0
