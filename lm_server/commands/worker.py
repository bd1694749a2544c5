"""Decodes jobs from Redis (docs/protocol.md) in N processes until SIGTERM or Ctrl-C.

Any number of these may run, on any machines; they share the jobs. A process that ends is started
again. Prints `lm-server ready redis=URL lm=DIR workers=N` on a line of standard output when jobs
can come.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading

from lm_server import settings
from lm_server.commands import options
from lm_server.commands.serve import add_running_options
from lm_server.processes import default_workers, stop_with_parent
from lm_server.rescoring import rescore
from lm_server.search import load as search
from lm_server.serving import logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_model_option(parser)
    add_running_options(parser)
    options.add_workers_option(parser)
    parser.add_argument(
        "--lease-seconds",
        type=float,
        default=10.0,
        help="a worker without a sign of life for so long loses its job to another (default 10)",
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=3,
        help="a job that lost so many workers is answered by an error (default 3)",
    )
    parser.add_argument(
        "--rescore-seconds",
        type=float,
        default=60.0,
        help="a sentence not rescored by then is answered without it (default 60)",
    )
    logs.add_option(parser)
    options.add_search_options(parser)


def run(args: argparse.Namespace) -> int:
    """Works until told to stop."""
    from lm_server.client.connection import connect, shown_url
    from lm_server.serving.embedded_redis import RedisStartError, embedded_redis
    from lm_server.serving.supervisor import supervise
    from lm_server.serving.worker import Terms, Worker

    search.need_packages(args.backend)
    logs.use(args.log_format)
    workers = default_workers() if args.workers is None else args.workers
    given = (("workers", workers, 1), ("attempts", args.attempts, 1))
    seconds = (
        *(("lease-seconds", args.lease_seconds, 0.5), ("wait-seconds", args.wait_seconds, 0)),
        ("rescore-seconds", args.rescore_seconds, 0.1),
    )
    for name, value, least in (*given, *seconds):
        if not value >= least:
            raise settings.SettingsError(f"--{name} is {value:g}; needed at least {least:g}")
    chosen = options.settings_from(args)
    words = options.hot_words_from(args)
    terms = Terms(args.lease_seconds, args.attempts, args.rescore_seconds)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(embedded_redis()) if args.embedded_redis else None
        url = own.url if own else args.redis
        connect(url, args.wait_seconds, stop).close()
        # Read before the processes are forked, so that they share its memory.
        model = search.load_model(args.lm, args.backend)
        # Words that cannot be used show here once, and not in every process again and again.
        model.search(chosen, words)

        def work(ended: threading.Event) -> None:
            # It answered a moment ago: should it be away now, it is waited for.
            with connect(url, float("inf"), ended) as client:
                # torch does not survive a fork, so each process loads its own.
                scorer = rescore.from_options(args)
                queue = None if scorer is None else rescore.RescoringQueue(scorer)
                finish = None if queue is None else queue.submit
                Worker(client, model, chosen, finish, terms, hot_words=words).run(ended)
                if queue is not None:
                    queue.close()

        def check() -> None:
            if own and not own.alive:
                raise RedisStartError(
                    f"the embedded Redis ended with exit code {own.process.returncode}"
                )

        print(
            f"lm-server ready redis={shown_url(url)} lm={args.lm} workers={workers} "
            f"pid={os.getpid()}",
            flush=True,
        )
        # Its thread starts only after the fork of the first processes.
        watch = stop_with_parent if args.exit_with_parent else None
        supervise(work, workers, stop, check, watch)
    return 0
