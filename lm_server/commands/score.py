"""Decode files of logits and count their errors: a line of JSON for each, with trials, failed,
words, errors and wer, and oracle_errors and oracle_wer of each n-best list's hypothesis that is
nearest to the truth.

Without --logits, names of files are read from the standard input, one a line, after a line
{"ready": true}. The command then ends with its standard input, at once. `b2txt train` runs it so,
for train.validate_lm. The exit code is 1 if a file could not be scored.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm_server.commands import options
from lm_server.errors import UserError
from lm_server.process import leave
from lm_server.rescoring.load import llm_from_options
from lm_server.search.load import load_model, need_packages

_NICENESS = 10
"""Of a process beside a training, which goes first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    options.add_model_option(parser)
    parser.add_argument(
        "--logits",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".npz files of `b2txt infer --split val` (default: names on the standard input)",
    )
    options.add_search_options(parser, hot_words=False)
    options.add_fuse_option(parser)


def run(args: argparse.Namespace) -> int:
    """Score the files."""
    from lm_server.tuning.score import score_file

    need_packages(args.backend)
    settings = options.settings_from(args)
    options.warn_of_no_question(args, settings)
    if args.logits is None:
        os.nice(_NICENESS)
    model = load_model(args.lm, args.backend)
    scorer = llm_from_options(args)
    paths: Iterable[Path] = args.logits or _named_on_input()
    status = 0
    with options.fused(args, model, scorer) as searching:
        for path in paths:
            try:
                found = score_file(searching, settings, path, scorer)
            except UserError as error:
                found, status = {"error": str(error)}, 1
            print(json.dumps({"file": str(path), **found}), flush=True)
    return status


def _named_on_input() -> Iterator[Path]:
    """Yield the files that are named on the standard input. Its end ends the process, whatever it
    is doing, since nobody is left to read the result."""
    names: queue.Queue[str] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in sys.stdin:
                names.put(line.strip())
        leave(0)

    print(json.dumps({"ready": True}), flush=True)
    threading.Thread(target=read, daemon=True).start()
    while True:
        yield Path(names.get())
