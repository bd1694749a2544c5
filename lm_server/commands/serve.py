"""Serves a model folder through Redis streams (docs/protocol.md) until SIGTERM or Ctrl-C.

Prints `lm-server ready redis=URL lm=DIR` on a line of standard output when it listens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING

from lm_server import settings
from lm_server.commands import options
from lm_server.processes import stop_with_parent
from lm_server.protocol import MAX_MESSAGE_FRAMES
from lm_server.rescoring import rescore
from lm_server.search import load as search
from lm_server.serving import logs

if TYPE_CHECKING:
    from lm_server.serving.limits import Limits

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


def add_running_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every process that goes on until it is told to stop can be told: where Redis is,
    how long it is waited for, and when to stop."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_model_option(parser)
    add_running_options(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-sessions", type=int, default=64, help="besides the default one (default 64)"
    )
    limits.add_argument(
        "--session-idle-seconds",
        type=float,
        default=600.0,
        help="a session without entries for so long is closed (default 600)",
    )
    limits.add_argument(
        "--max-sentence-frames",
        type=int,
        default=MAX_MESSAGE_FRAMES,
        help=f"frames of 80 ms (default and most: {MAX_MESSAGE_FRAMES})",
    )
    limits.add_argument(
        "--rescore-seconds",
        type=float,
        default=20.0,
        help="a sentence not rescored by then is answered without it (default 20)",
    )
    limits.add_argument(
        "--grace-seconds",
        type=float,
        default=3.0,
        help="at the stop, time for sentences under way to end (default 3)",
    )
    logs.add_option(parser)
    options.add_search_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until told to stop."""
    from lm_server.client.connection import connect, shown_url
    from lm_server.serving.embedded_redis import RedisStartError, embedded_redis
    from lm_server.serving.server import Server
    from lm_server.serving.session import Session

    search.need_packages(args.backend)
    logs.use(args.log_format)
    limits = _limits(args)
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
        chosen = options.settings_from(args)
        words = options.hot_words_from(args)
        # Connecting first: a wrong URL shows at once, not after the model is read.
        client = stack.enter_context(connect(url, args.wait_seconds, stop))
        model = search.load_model(args.lm, args.backend)
        scorer = rescore.from_options(args)
        finish = None
        if scorer is not None:
            queue = rescore.RescoringQueue(scorer)
            stack.callback(queue.close)
            finish = queue.submit

        def session(name: str) -> Session:
            return Session(model, chosen, name, finish, words, args.max_sentence_frames)

        server = Server(client, session, limits)

        def check() -> None:
            if own and not own.alive:
                raise RedisStartError(
                    f"the embedded Redis ended with exit code {own.process.returncode}"
                )

        print(f"lm-server ready redis={shown_url(url)} lm={args.lm}", flush=True)
        server.run(stop, check)
    return 0


def _limits(args: argparse.Namespace) -> Limits:
    from lm_server.serving.limits import Limits

    if not 1 <= args.max_sentence_frames <= MAX_MESSAGE_FRAMES:
        raise settings.SettingsError(
            f"--max-sentence-frames is {args.max_sentence_frames}; needed 1 to {MAX_MESSAGE_FRAMES}"
        )
    for name, least in (
        *(("max_sessions", 0), ("rescore_seconds", 0.1)),
        *(("grace_seconds", 0), ("wait_seconds", 0)),
    ):
        if not getattr(args, name) >= least:
            raise settings.SettingsError(
                f"--{name.replace('_', '-')} is {getattr(args, name):g}; needed {least} or more"
            )
    if not args.session_idle_seconds > 0:
        raise settings.SettingsError(
            f"--session-idle-seconds is {args.session_idle_seconds:g}; needed more than 0"
        )
    return Limits(
        sessions=args.max_sessions,
        idle_seconds=args.session_idle_seconds,
        rescore_seconds=args.rescore_seconds,
        grace_seconds=args.grace_seconds,
    )
