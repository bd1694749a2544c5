"""Decode a logits file to JSON lines {trial, sentence, confidence, word_confidences, rescored,
problem, nbest: [{sentence, acoustic, ngram, bonus, llm, total}]}.

The exit code is 1 if some trials could not be decoded, or not rescored although --llm is given. The
others are written, and so is the n-gram model's answer of those that are not rescored.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lm_server.atomic_file import require_writable
from lm_server.commands import options
from lm_server.processes import cleaning_up_when_terminated
from lm_server.rescoring.load import llm_from_options
from lm_server.search.load import load_model, need_packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    options.add_model_option(parser)
    parser.add_argument(
        "--logits", type=Path, required=True, metavar="FILE", help=".npz with logits, frames, trial"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON lines to write"
    )
    options.add_workers_option(parser)
    options.add_search_options(parser)


def run(args: argparse.Namespace) -> int:
    """Decode the file."""
    from lm_server.offline import decode_file, read_logits

    need_packages(args.backend)
    workers = options.workers_from(args)
    settings = options.settings_from(args)
    words = options.hot_words_from(args)
    # The files first: a wrong one is reported at once, not after the model is read.
    require_writable(args.out, inputs=[args.lm, args.logits])
    logits = read_logits(args.logits)
    options.warn_of_another_checkpoint(args, logits.checkpoint)
    with cleaning_up_when_terminated():
        model = load_model(args.lm, args.backend)
        problems = decode_file(
            model, settings, logits, args.out, workers, lambda: llm_from_options(args), words
        )
    if not logits.trials:
        print(f"warning: {args.logits} holds 0 trials: {args.out} is empty", file=sys.stderr)
    if problems:
        what = "decoded" if args.llm is None else "decoded and rescored"
        print(f"error: {problems} trials could not be {what} (named above)", file=sys.stderr)
    return 1 if problems else 0
