"""Makes a model folder: text -> n-gram model (lmplz if on PATH, else kaldingram) -> KenLM trie,
with a lexicon."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_server.processes import cleaning_up_when_terminated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="text: .txt, .gz or .xz"
    )
    parser.add_argument(
        "--order", type=int, default=3, help="longest n-grams, 1-5 words (default 3)"
    )
    parser.add_argument(
        "--lexicon", default="cmudict", metavar="cmudict|FILE", help="words and pronunciations"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="model folder to write or replace"
    )


def run(args: argparse.Namespace) -> int:
    """Builds the folder."""
    from lm_server.build_lm import build

    with cleaning_up_when_terminated():
        build(args.text, args.order, args.lexicon, args.out)
    return 0
