"""Makes a model folder of a Kaldi language model: words.txt and G.fst as arpa2fst made it, or an
ARPA file.

Nothing is trained anew. Words get the pronunciations of the model's own lexicon, if there is one,
else those of CMU's dictionary, else guesses; what has none is dropped and named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_server.processes import cleaning_up_when_terminated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
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
    parser.add_argument(
        "--quantise", type=int, metavar="BITS", help="bits of each probability (2-25; 8 is usual)"
    )
    parser.add_argument(
        "--compress", action="store_true", help="compress pointers: smaller, a little slower"
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        nargs="+",
        default=(),
        metavar="PATH",
        help="text to measure the model on",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="model folder to write or replace"
    )


def run(args: argparse.Namespace) -> int:
    """Imports the model."""
    from lm_server.lm.arpa import ModelError
    from lm_server.lm.kaldi.importer import import_kaldi
    from lm_server.lm.trie.kenlm_binary import TrieForm

    try:
        form = TrieForm(args.quantise, args.compress)
    except ValueError as error:
        raise ModelError(str(error)) from error
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
