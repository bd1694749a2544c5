"""Make a model folder of a Kaldi language model: words.txt and G.fst of arpa2fst, or an ARPA file.

Nothing is trained. Pronunciations come from the model's own lexicon if there is one, else from
CMU's dictionary, else from guesses. Words without any are dropped and named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_server.commands import options
from lm_server.process import cleaning_up_when_terminated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="DIR|FILE",
        help="folder with words.txt and G.fst; or a grammar (such as G_no_prune.fst) with words.txt"
        " beside it; or an ARPA file, also .gz",
    )
    parser.add_argument(
        "--lexicon",
        type=Path,
        metavar="FILE",
        help="words and phonemes in Kaldi's format (default: lexicon.txt in or above the folder)",
    )
    parser.add_argument(
        "--no-g2p", action="store_true", help="drop words that no lexicon has, instead of guessing"
    )
    options.add_build_options(parser, "text to measure the model on")


def run(args: argparse.Namespace) -> int:
    """Import the model."""
    from lm_server.lm.kaldi.importer import import_kaldi

    form = options.trie_form(args)
    with cleaning_up_when_terminated():
        import_kaldi(
            args.source,
            args.out,
            args.lexicon,
            not args.no_g2p,
            form,
            held_out=args.held_out,
        )
    return 0
