"""Serves a model folder through Redis streams (docs/protocol.md) until SIGTERM or Ctrl-C.

Prints `lm-server ready redis=URL lm=DIR` on a line of standard output when it listens.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lm_server import settings
from lm_server.commands import options
from lm_server.process import stop_with_parent
from lm_server.protocol import MAX_MESSAGE_FRAMES
from lm_server.rescoring.load import llm_from_options
from lm_server.search.load import load_model, need_packages
from lm_server.serving import logs
from lm_server.serving.status import Report

if TYPE_CHECKING:
    from lm_server.serving.http import OperatorsPort

_log = logging.getLogger(__name__)

DEFAULT_URL = "redis://127.0.0.1:6379/0"


class Number(NamedTuple):
    """An option that is a number. The type is that of the default."""

    name: str
    default: float
    least: float
    help: str
    most: float = math.inf


WAIT = Number("--wait-seconds", 10.0, 0, "wait for Redis at the start")
_LIMITS = (
    Number("--max-sessions", 64, 0, "besides the default one"),
    Number("--session-idle-seconds", 600.0, 0.001, "a session without entries is closed then"),
    Number(
        *("--max-sentence-frames", MAX_MESSAGE_FRAMES, 1, "frames of 80 ms"), MAX_MESSAGE_FRAMES
    ),
    Number("--rescore-seconds", 20.0, 0.1, "a sentence not rescored by then is answered without"),
    Number("--grace-seconds", 3.0, 0, "at the stop, time for sentences under way to end"),
    Number(
        "--lease-seconds",
        4.0,
        0.5,
        "a server without a sign of life for so long loses its sessions to another; the same for "
        "all servers of a Redis",
        30.0,  # The saved state must outlive the lease, or its heir finds none.
    ),
    Number("--entry-seconds", 60.0, 0.1, "computing time of one entry; more ends its sentence"),
)


def add_redis_option(parser: argparse._ActionsContainer) -> None:
    """Add --redis."""
    parser.add_argument(
        "--redis",
        default=os.environ.get("B2TXT_REDIS_URL", DEFAULT_URL),
        metavar="URL",
        help="redis://, rediss:// (TLS) or unix://, with user and password if need be "
        f"(default $B2TXT_REDIS_URL, else {DEFAULT_URL})",
    )


def add_numbers(parser: argparse._ActionsContainer, numbers: Sequence[Number]) -> None:
    """Add options that are numbers."""
    for one in numbers:
        parser.add_argument(
            one.name,
            type=type(one.default),
            default=one.default,
            help=f"{one.help} (default {one.default:g})",
        )


def check_numbers(args: argparse.Namespace, numbers: Sequence[Number]) -> None:
    """Check options that are numbers.

    Raises:
      SettingsError: one is outside its range.
    """
    for one in numbers:
        value = getattr(args, one.name.lstrip("-").replace("-", "_"))
        if not one.least <= value <= one.most:
            upper = "" if math.isinf(one.most) else f" and at most {one.most:g}"
            raise settings.SettingsError(
                f"{one.name} is {value:g}; needed at least {one.least:g}{upper}"
            )


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every process that decodes until it is stopped."""
    options.add_model_option(parser)
    where = parser.add_mutually_exclusive_group()
    add_redis_option(where)
    where.add_argument(
        "--embedded-redis",
        action="store_true",
        help="start a Redis of our own and stop it at the end",
    )
    add_numbers(parser, [WAIT])
    parser.add_argument(
        "--http",
        metavar="PORT",
        help="answer /live, /ready and /metrics (Prometheus) on 127.0.0.1:PORT, or on HOST:PORT",
    )
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="stop when the process that started us ends"
    )
    logs.add_option(parser)
    options.add_search_options(parser)
    options.add_fuse_option(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_process_options(parser)
    limits = parser.add_argument_group("limits")
    add_numbers(limits, _LIMITS)
    options.add_ceiling_option(limits)


def stopped_by_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def operators_port(address: str | None, report: Callable[[], Report]) -> OperatorsPort | None:
    """Return the bound port of --http. None without it.

    Raises:
      HttpError: it cannot be bound.
    """
    if address is None:
        return None
    from lm_server.serving.http import OperatorsPort

    port = OperatorsPort(address, report)
    _log.info("/live, /ready and /metrics are at %s", port.url)
    return port


@contextlib.contextmanager
def chosen_redis(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the URL of the chosen Redis, and a check that raises when an embedded one has ended."""
    from lm_server.serving.embedded_redis import embedded_redis

    if args.embedded_redis:
        with embedded_redis() as own:
            yield own.url, own.check
    else:
        yield args.redis, lambda: None


def run(args: argparse.Namespace, ready: Callable[[], None] = lambda: None) -> int:
    """Serve until stopped. `ready` is called when the server listens."""
    from lm_server.client.connection import connect, mask_password, redis_errors
    from lm_server.rescoring.answering import Answering
    from lm_server.serving.keys.rights import check_rights, server_needs
    from lm_server.serving.ownership import Limits
    from lm_server.serving.server import Server
    from lm_server.serving.session import Session
    from lm_server.serving.status import new_name

    need_packages(args.backend)
    logs.use(args.log_format)
    check_numbers(args, [WAIT, *_LIMITS])
    stop = stopped_by_signals()
    if args.exit_with_parent:
        stop_with_parent(stop)
    server: Server | None = None

    def report() -> Report:
        return Report(True, False, "starting") if server is None else server.report()

    port = operators_port(args.http, report)
    if port is not None:
        port.start()
    with contextlib.ExitStack() as stack:
        url, check = stack.enter_context(chosen_redis(args))
        chosen = options.settings_from(args)
        options.warn_of_no_question(args, chosen)
        ceilings = options.ceilings_from(args, chosen)
        words = options.hot_words_from(args)
        # Connecting first: a wrong URL shows at once, not after the model is read.
        client = stack.enter_context(connect(url, args.wait_seconds, stop))
        name = new_name("server")
        masked = mask_password(url)
        with redis_errors(masked, "lm-server serve"):
            check_rights(client, url, server_needs(name, args.max_sessions > 0))
        model = load_model(args.lm, args.backend)
        scorer = llm_from_options(args)
        model = stack.enter_context(options.fused(args, model, scorer, aside=True))
        answering = Answering(scorer, args.rescore_seconds)
        stack.callback(answering.close)

        def session(name: str) -> Session:
            frames = args.max_sentence_frames
            return Session(model, chosen, name, answering, words, frames, ceilings)

        limits = Limits(
            sessions=args.max_sessions,
            idle_seconds=args.session_idle_seconds,
            grace_seconds=args.grace_seconds,
            lease_seconds=args.lease_seconds,
            entry_seconds=args.entry_seconds,
        )
        with redis_errors(masked, "lm-server serve"):
            server = Server(client, session, limits, name)
        print(f"lm-server ready redis={masked} lm={args.lm}", flush=True)
        ready()
        server.run(stop, check)
    return 0
