"""Make a model folder: text -> n-gram model (modified Kneser-Ney) -> KenLM trie, with a lexicon.

Several options make it smaller: --prune (rare n-grams), --ngrams or --size (the n-grams that matter
least), --quantise and --compress (fewer bits for each), --vocabulary (fewer words). The costs of
each are in docs/language_models.md.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lm_server.commands import options
from lm_server.process import cleaning_up_when_terminated

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def amount(text: str) -> int:
    """Return the number that a text with a decimal unit means, such as 500M or 2G.

    Raises:
      ArgumentTypeError: it means none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}; needed a number such as 500M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _vocabulary(text: str) -> int | Path:
    return int(text) if re.fullmatch(r"-?\d+", text) else Path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="text: .txt, .gz or .xz files, or folders of such files",
    )
    parser.add_argument(
        "--order", type=int, default=3, help="longest n-grams, 1-5 words (default 3)"
    )
    parser.add_argument(
        "--lexicon",
        default="cmudict",
        metavar="cmudict|FILE",
        help="words and pronunciations (default cmudict)",
    )
    parser.add_argument(
        "--vocabulary",
        type=_vocabulary,
        metavar="N|FILE",
        help="the N most frequent words of the text, or the words that a file lists (default: the "
        "whole lexicon)",
    )
    parser.add_argument(
        "--g2p",
        action="store_true",
        help="guess pronunciations of words that the lexicon lacks, instead of leaving them out",
    )
    parser.add_argument(
        "--prune",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="cut-offs per order: n-grams seen no more often than this are left out; the first is "
        "0, the last holds for higher orders (as lmplz): 0 0 1",
    )
    parser.add_argument(
        "--ngrams",
        type=amount,
        metavar="N",
        help="keep at most N n-grams of order 2 and up, those that matter most (entropy pruning)",
    )
    parser.add_argument(
        "--size",
        type=amount,
        metavar="BYTES",
        help="keep as many n-grams as make an lm.bin of this size, such as 50M",
    )
    parser.add_argument(
        "--memory",
        type=amount,
        default=2 * 10**9,
        metavar="BYTES",
        help="memory for sorting; the rest is on disk beside --out (default 2G)",
    )
    options.add_build_options(
        parser, "text to measure the model on (default: every hundredth sentence of --text)"
    )


def run(args: argparse.Namespace) -> int:
    """Build the folder."""
    from lm_server.lm.build import Options, build

    chosen = Options(
        vocabulary=args.vocabulary,
        guess=args.g2p,
        prune=tuple(args.prune),
        ngrams=args.ngrams,
        size=args.size,
        form=options.trie_form(args),
        memory=args.memory,
        held_out=tuple(args.held_out),
    )
    with cleaning_up_when_terminated():
        build(args.text, args.order, args.lexicon, args.out, options=chosen)
    return 0
