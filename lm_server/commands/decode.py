"""Decodes a logits file to JSON lines {trial, sentence, confidence, word_confidences, rescored,
problem, nbest: [{sentence, acoustic, ngram, bonus, llm, total}]}.

The exit code is 1 if some trials could not be decoded, or not rescored with --llm; the others are
written, and so is the n-gram model's answer of those that are not rescored.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lm_server import settings
from lm_server.processes import cleaning_up_when_terminated, default_workers
from lm_server.rescoring.load import add_llm_options, llm_from_options
from lm_server.search import hot_words
from lm_server.search import interface as search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--lm", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument(
        "--logits", type=Path, required=True, metavar="FILE", help=".npz with logits, frames, trial"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON lines to write"
    )
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes (default: all cores)"
    )
    search.add_option(parser)
    hot_words.add_option(parser)
    add_llm_options(parser)
    settings.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Decodes the file."""
    from lm_server.offline import decode_file, read_logits

    search.need_packages(args.backend)
    workers = default_workers() if args.workers is None else args.workers
    if workers < 1:
        raise settings.SettingsError(f"--workers is {workers}; needed at least 1")
    chosen = settings.from_options(args)
    settings.warn_without_effect(args)
    words = hot_words.from_options(args)
    # The file first: a wrong one shows at once, not after the model is read.
    logits = read_logits(args.logits)
    with cleaning_up_when_terminated():
        model = search.load_model(args.lm, args.backend)
        problems = decode_file(
            model, chosen, logits, args.out, workers, lambda: llm_from_options(args), words
        )
    if not logits.trials:
        print(f"warning: {args.logits} holds 0 trials: {args.out} is empty", file=sys.stderr)
    if problems:
        what = "decoded" if args.llm is None else "decoded and rescored"
        print(f"error: {problems} trials could not be {what} (named above)", file=sys.stderr)
    return 1 if problems else 0
