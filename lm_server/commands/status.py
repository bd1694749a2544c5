"""Shows the servers, workers, sessions and jobs of a Redis.

The exit code is 1 if no server and no worker is there.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from typing import Any

from lm_server.commands.serve import add_redis_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_redis_option(parser)
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show the status once."""
    from lm_server.client.connection import LOST, RedisUnavailableError, connect, mask_password
    from lm_server.serving.status import gather

    with connect(args.redis, 0.0, threading.Event()) as client:
        try:
            found = gather(client)
        except LOST as error:
            raise RedisUnavailableError(
                f"Redis at {mask_password(args.redis)} cannot report its status ({error}): "
                "try again, or look at the user's rights"
            ) from error
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found, mask_password(args.redis))
    return 0 if found["processes"] else 1


def _show(found: dict[str, Any], url: str) -> None:
    from rich.console import Console
    from rich.table import Table

    # A table in a pipe or a file is read by people all the same, with room for the names.
    # Names come from Redis, so none of them is markup.
    console = Console(soft_wrap=True, markup=False)
    if not console.is_terminal:
        console = Console(soft_wrap=True, markup=False, width=180)
    redis = found["redis"]
    console.print(f"Redis {redis['version']} at {url}: {redis['memory_mb']} MB")
    jobs = found["jobs"]
    console.print(f"jobs: {jobs['waiting']} waiting, {jobs['under_way']} under way")
    owners = ", ".join(f"{name}: {owner or 'nobody'}" for name, owner in found["sessions"].items())
    console.print(f"sessions: {owners}")
    for key in found["unreadable"]:
        console.print(f"not written by lm-server: {key}; look for the program that wrote it")
    if not found["processes"]:
        console.print("no server and no worker is running here")
        return
    table = Table()
    for column in ("process", "kind", "up", "sentences", "errors", "waiting", "memory"):
        table.add_column(column, justify="left" if column in ("process", "kind") else "right")
    table.add_column("partial p50 / p99", justify="right")
    table.add_column("final p50 / p99", justify="right")
    for one in found["processes"]:
        times = [
            " / ".join(one.get(f"{what}_ms_{share}", "-") for share in ("p50", "p99"))
            for what in ("partial", "final")
        ]
        table.add_row(
            one["name"],
            one["kind"],
            f"{time.time() - float(one['started']):.0f} s",
            one.get("sentences", "0"),
            one.get("errors", "0"),
            one.get("waiting_answers", one.get("held_jobs", "0")),
            f"{one['memory_mb']} MB",
            *(f"{pair} ms" for pair in times),
        )
    console.print(table)
