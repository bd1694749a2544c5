"""Adapt a language model to a person: add sentences and words, and mix it with other models.

Takes seconds, because nothing that is there is estimated anew. The weights of the models are those
with the least perplexity on --held-out, or on the person's own sentences.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_server.commands import options
from lm_server.process import cleaning_up_when_terminated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    options.add_model_option(parser)
    parser.add_argument(
        "--with",
        dest="others",
        type=Path,
        nargs="+",
        default=(),
        metavar="DIR|FILE",
        help="further models: model folders, ARPA files, or grammars as `import-kaldi` reads them",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=(),
        metavar="PATH",
        help="the person's sentences: .txt, .gz or .xz files, or folders; words that no model has "
        "are added with guessed pronunciations",
    )
    parser.add_argument(
        "--vocabulary-add",
        nargs="+",
        default=(),
        metavar="WORD|FILE",
        help="the person's words, such as names, or files of lines `WORD [PH PH ...]`; without "
        "phonemes the pronunciations are guessed from the spelling",
    )
    options.add_held_out_option(
        parser,
        "text to choose the weights on (default: the sentences of --text, each scored by a model "
        "of the others)",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="weights instead: of --lm, of each one of --with, and of --text; 1 together",
    )
    options.add_out_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the adapted model."""
    from lm_server.lm.adapt import Sources, adapt

    sources = Sources(
        [args.lm, *args.others], args.text, args.vocabulary_add, args.held_out, args.weights
    )
    with cleaning_up_when_terminated():
        adapt(sources, args.out)
    return 0
