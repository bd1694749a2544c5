"""Decodes jobs from Redis (docs/protocol.md) in N processes until SIGTERM or Ctrl-C.

Any number of these may run, on any machines. They share the jobs. A process that ends is started
again. Prints `lm-server ready redis=URL lm=DIR workers=N` on a line of standard output when jobs
can come.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time

from lm_server.commands import options
from lm_server.commands.serve import (
    WAIT,
    Number,
    add_numbers,
    add_process_options,
    check_numbers,
    chosen_redis,
    operators_port,
    stopped_by_signals,
)
from lm_server.process import stop_with_parent
from lm_server.rescoring.load import llm_from_options
from lm_server.search.load import load_model, need_packages
from lm_server.serving import logs

_TERMS = (
    Number(
        *("--lease-seconds", 10.0, 0.5),
        "a worker without a sign of life for so long loses its job to another",
    ),
    Number("--attempts", 3, 1, "a job that lost so many workers is answered by an error"),
    Number("--rescore-seconds", 60.0, 0.1, "a sentence not rescored by then is answered without"),
    Number("--job-seconds", 600.0, 0.1, "computing time of one job; more is answered by an error"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_process_options(parser)
    options.add_workers_option(parser)
    add_numbers(parser, _TERMS)
    options.add_ceiling_option(parser)


def run(args: argparse.Namespace) -> int:
    """Work until stopped."""
    from lm_server.client.connection import (
        LOST,
        connect,
        mask_password,
        redis_client,
        redis_errors,
    )
    from lm_server.rescoring.answering import Answering
    from lm_server.serving.keys.rights import check_rights, worker_needs
    from lm_server.serving.status import STUCK_SECONDS, Report, new_name, report_of_children
    from lm_server.serving.supervisor import Busy, supervise
    from lm_server.serving.worker import Terms, Worker

    need_packages(args.backend)
    logs.use(args.log_format)
    args.workers = options.workers_from(args)
    check_numbers(args, [WAIT, *_TERMS])
    chosen = options.settings_from(args)
    options.warn_of_no_question(args, chosen)
    ceilings = options.ceilings_from(args, chosen)
    words = options.hot_words_from(args)
    terms = Terms(args.lease_seconds, args.attempts, job_seconds=args.job_seconds)
    stop = stopped_by_signals()
    ticked = time.monotonic()
    with contextlib.ExitStack() as stack:
        url, check = stack.enter_context(chosen_redis(args))
        masked = mask_password(url)
        with (
            connect(url, args.wait_seconds, stop) as client,
            redis_errors(masked, "lm-server worker"),
        ):
            check_rights(client, url, worker_needs(new_name("worker")))
        aside = stack.enter_context(redis_client(url, timeout=5.0))

        def report() -> Report:
            if time.monotonic() - ticked > STUCK_SECONDS:
                return Report(False, False, "stuck")
            try:
                return report_of_children(aside)
            except LOST as error:
                return Report(True, False, f"no connection to Redis ({error})")

        port = operators_port(args.http, report)
        # Read before the processes are forked, so that they share its memory.
        model = load_model(args.lm, args.backend)
        # Words that cannot be used show here once, and not in every process again and again.
        model.search(chosen, words)

        def work(ended: threading.Event, busy: Busy) -> None:
            # It answered a moment ago: should it be away now, it is waited for.
            with connect(url, float("inf"), ended) as client:
                # torch does not survive a fork, so each process loads its own.
                scorer = llm_from_options(args)
                answering = Answering(scorer, args.rescore_seconds)
                with options.fused(args, model, scorer) as used:
                    Worker(
                        *(client, used, chosen, answering, terms),
                        hot_words=words,
                        ceilings=ceilings,
                        busy=busy,
                    ).run(ended)
                answering.close()

        print(
            f"lm-server ready redis={masked} lm={args.lm} workers={args.workers} pid={os.getpid()}",
            flush=True,
        )

        def tick() -> None:
            nonlocal ticked
            ticked = time.monotonic()
            check()

        def watch(stop: threading.Event) -> None:
            # Threads start only after the fork of the first processes.
            if args.exit_with_parent:
                stop_with_parent(stop)
            if port is not None:
                port.start()

        supervise(work, args.workers, stop, tick, watch)
    return 0
