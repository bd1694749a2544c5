"""Bring what phoneme-to-words-lm has: its KenLM binary file and lexicon, or its pickled logits.

The KenLM file is used where it lies: the model folder has a link to it. Of a pickle only numpy
arrays, texts and numbers are read. See docs/moving_from_phoneme_to_words_lm.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_server.commands import options
from lm_server.errors import UserError
from lm_server.files.atomic_file import require_writable
from lm_server.process import cleaning_up_when_terminated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kenlm", type=Path, metavar="FILE", help="KenLM binary file of any kind")
    what.add_argument(
        "--logits",
        type=Path,
        metavar="FILE",
        help="pickle of {logits, adjusted_lens, transcription}",
    )
    parser.add_argument(
        "--lexicon", type=Path, metavar="FILE", help="with --kenlm: words, a tab, phonemes and SIL"
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="the classes in their order, one a line (default for --logits: BLANK, AA to ZH, SIL: "
        "the RNN's)",
    )
    options.add_held_out_option(parser, "with --kenlm: text to measure the model on")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR|FILE",
        help="model folder to write or replace; with --logits the .npz file",
    )


def run(args: argparse.Namespace) -> int:
    """Import."""
    from lm_server.files.pickled_logits import convert
    from lm_server.lm.kenlm_import import import_kenlm, read_tokens
    from lm_server.protocol import CLASSES

    if args.kenlm is not None:
        if args.lexicon is None:
            raise UserError("--kenlm needs --lexicon FILE with the pronunciations of its words")
        with cleaning_up_when_terminated():
            import_kenlm(args.kenlm, args.lexicon, args.out, args.tokens, held_out=args.held_out)
        return 0
    require_writable(args.out, inputs=[args.logits])
    tokens = CLASSES if args.tokens is None else read_tokens(args.tokens)
    count, ignored = convert(args.logits, args.out, tokens)
    without = f", without {', '.join(ignored)}, which have no place there" if ignored else ""
    print(f"{args.out}: {count} trials{without}")
    return 0
