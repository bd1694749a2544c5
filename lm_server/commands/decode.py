"""Decode a logits file to JSON lines {trial, sentence, confidence, word_confidences, rescored,
problem, temperature, nbest: [{sentence, acoustic, ngram, bonus, llm, total}]}.

Several files of the same trials, of other seeds, recipes or models, answer each trial together: by
minimum Bayes risk over their n-best lists, by ROVER, or by one decoding of their averaged logits.
Of a consensus of lists, nbest has only the sentences, with the negative word errors to expect as
their totals.

Every answer is kept in OUT.unfinished at once. After an interruption the same command decodes the
trials that are left. The exit code is 1 if some trials could not be decoded, or not rescored
although --llm is given. The others are written, and so is the n-gram model's answer of those that
are not rescored. A trial that one of several systems could not decode is answered by the others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lm_server.commands import options
from lm_server.files.atomic_file import require_writable
from lm_server.process import cleaning_up_when_terminated, version
from lm_server.rescoring.consensus import METHODS
from lm_server.rescoring.load import llm_from_options
from lm_server.rescoring.scorer import find_model
from lm_server.search.hot_words import HotWord
from lm_server.search.load import load_model, need_packages
from lm_server.settings import Settings

if TYPE_CHECKING:
    from lm_server.files.logits_file import Logits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    options.add_model_option(parser)
    parser.add_argument(
        "--logits",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help=".npz with logits, frames, trial; several: the same trials by other systems",
    )
    parser.add_argument(
        "--combine",
        choices=(*METHODS, "logits"),
        default=METHODS[0],
        help="several --logits: minimum Bayes risk, ROVER, or averaged logits (default mbr)",
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
    """Decode the files."""
    from lm_server.offline import decode_file

    need_packages(args.backend)
    workers = options.workers_from(args)
    settings = options.settings_from(args)
    options.warn_of_no_question(args, settings)
    words = options.hot_words_from(args)
    # The files first: a wrong one is reported at once, not after the model is read.
    require_writable(args.out, inputs=[args.lm, *args.logits])
    systems, digests = _read(args)
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
            systems,
            args.out,
            workers,
            load,
            words,
            _fingerprints(args, settings, digests, words),
            args.restart,
            args.combine,
        )
    if not any(one.trials for one in systems.values()):
        print(f"warning: {args.logits[0]} holds 0 trials: {args.out} is empty", file=sys.stderr)
    if problems:
        what = "decoded" if args.llm is None else "decoded and rescored"
        print(f"error: {problems} trials could not be {what} (named above)", file=sys.stderr)
    return 1 if problems else 0


def _read(args: argparse.Namespace) -> tuple[dict[str, Logits], str]:
    """Return what is decoded by its name, of the same trials, and fingerprints of the files.

    Raises:
      LogitsFileError: a file cannot be used, is named twice, or has other trials or frames.
    """
    from lm_server.files.logits_file import LogitsFileError, read_logits
    from lm_server.files.several_logits import averaged, of_same_trials

    twice = [path for path, count in Counter(args.logits).items() if count > 1]
    if twice:
        raise LogitsFileError(f"--logits names {twice[0]} twice; needed each system once")
    files = {str(path): read_logits(path) for path in args.logits}
    digests = " ".join(one.digest() for one in files.values())
    systems = of_same_trials(files)
    if args.combine == "logits" and len(files) > 1:
        mean = averaged(systems)
        systems = {f"the mean of {len(files)} files": mean}
    options.warn_of_another_checkpoint(args, *(one.checkpoint for one in systems.values()))
    return systems, digests


def _fingerprints(
    args: argparse.Namespace, settings: Settings, logits: str, words: Mapping[str, HotWord]
) -> dict[str, str]:
    """Return fingerprints of all that the answers depend on, by the name of what it is."""
    from lm_server.tuning.cache import digest

    found = {
        "version of lm-server": version(),
        "--lm": digest(args.lm),
        "--logits": logits,
        "--combine": args.combine if len(args.logits) > 1 else "",
        "--backend": args.backend,
        **{name: str(value) for name, value in vars(settings).items()},
        "--hot-words": str(sorted(words.items())),
        "--fuse": str(args.fuse),
    }
    if args.llm is not None:
        model = digest(find_model(args.llm))
        found["--llm"] = f"{model} {args.llm_device} {args.llm_dtype} {args.llm_text}"
    return found
