"""Decode a logits file to JSON lines {trial, sentence, confidence, word_confidences, rescored,
problem, nbest: [{sentence, acoustic, ngram, bonus, llm, total}]}.

Every answer is kept in OUT.unfinished at once. After an interruption the same command decodes the
trials that are left. The exit code is 1 if some trials could not be decoded, or not rescored
although --llm is given. The others are written, and so is the n-gram model's answer of those that
are not rescored.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Mapping
from pathlib import Path

from lm_server.commands import options
from lm_server.files.atomic_file import require_writable
from lm_server.process import cleaning_up_when_terminated, version
from lm_server.rescoring.load import llm_from_options
from lm_server.search.hot_words import HotWord
from lm_server.search.load import load_model, need_packages
from lm_server.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    options.add_model_option(parser)
    parser.add_argument(
        "--logits", type=Path, required=True, metavar="FILE", help=".npz with logits, frames, trial"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON lines to write"
    )
    parser.add_argument(
        "--restart", action="store_true", help="drop what an interrupted run to --out has decoded"
    )
    options.add_workers_option(parser)
    options.add_search_options(parser)
    options.add_fuse_option(parser)


def run(args: argparse.Namespace) -> int:
    """Decode the file."""
    from lm_server.files.logits_file import read_logits
    from lm_server.offline import decode_file

    need_packages(args.backend)
    workers = options.workers_from(args)
    settings = options.settings_from(args)
    words = options.hot_words_from(args)
    # The files first: a wrong one is reported at once, not after the model is read.
    require_writable(args.out, inputs=[args.lm, args.logits])
    logits = read_logits(args.logits)
    options.warn_of_another_checkpoint(args, logits.checkpoint)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cleaning_up_when_terminated())
        model = load_model(args.lm, args.backend)
        load = functools.cache(lambda: llm_from_options(args))
        if args.fuse:
            model = stack.enter_context(options.fused(args, model, load()))
            if args.workers is not None and workers > 1:
                print("warning: with --fuse, one process searches for all", file=sys.stderr)
            workers = 1
        problems = decode_file(
            model,
            settings,
            logits,
            args.out,
            workers,
            load,
            words,
            _fingerprints(args, settings, logits.digest(), words),
            args.restart,
        )
    if not logits.trials:
        print(f"warning: {args.logits} holds 0 trials: {args.out} is empty", file=sys.stderr)
    if problems:
        what = "decoded" if args.llm is None else "decoded and rescored"
        print(f"error: {problems} trials could not be {what} (named above)", file=sys.stderr)
    return 1 if problems else 0


def _fingerprints(
    args: argparse.Namespace, settings: Settings, logits: str, words: Mapping[str, HotWord]
) -> dict[str, str]:
    """Return fingerprints of all that the answers depend on, by the name of what it is."""
    from lm_server.tuning.cache import digest

    lexicon = args.lm / "lexicon.txt"
    found = {
        "version of lm-server": version(),
        "--lm": digest(args.lm) + (digest(lexicon) if lexicon.is_file() else ""),
        "--logits": logits,
        "--backend": args.backend,
        **{name: str(value) for name, value in vars(settings).items()},
        "--hot-words": str(sorted(words.items())),
        "--fuse": str(args.fuse),
    }
    if args.llm is not None:
        from lm_server.rescoring.causal_lm import find_model

        model = digest(find_model(args.llm))
        found["--llm"] = f"{model} {args.llm_device} {args.llm_dtype} {args.llm_text}"
    return found
