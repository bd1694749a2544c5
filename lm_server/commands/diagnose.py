"""Find out why decoded sentences are wrong: the search, the language model, the acoustics, the
vocabulary, or words that are said alike.

For every wrong sentence, the scores of the truth are compared with those of the answer. Prints a
table of causes with WER and n-best oracle, before any rescoring. --out has every sentence with its
scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_server.commands import options
from lm_server.files.atomic_file import require_writable
from lm_server.process import cleaning_up_when_terminated
from lm_server.settings import SettingsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    options.add_model_option(parser)
    options.add_truth_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="every sentence, as .json or .csv (default: none)"
    )
    options.add_workers_option(parser)
    options.add_search_options(parser, hot_words=False)


def run(args: argparse.Namespace) -> int:
    """Diagnose."""
    from lm_server.files.logits_file import read_logits
    from lm_server.search.flashlight import LanguageModel
    from lm_server.tuning.diagnose import as_text, diagnose, write
    from lm_server.tuning.references import read_references

    if args.backend != "flashlight":
        raise SettingsError(
            f"--backend is {args.backend}; only the scores of the search flashlight are diagnosed: "
            "leave it out"
        )
    if args.out is not None:
        if args.out.suffix not in (".json", ".csv"):
            raise SettingsError(f"--out is {args.out}; needed a name that ends in .json or .csv")
        require_writable(args.out, inputs=[args.lm, args.logits])
    workers, settings = options.workers_from(args), options.settings_from(args)
    logits = read_logits(args.logits)
    options.warn_of_another_checkpoint(args, logits.checkpoint)
    references = read_references(args.refs or args.logits)
    with cleaning_up_when_terminated():
        found = diagnose(LanguageModel(args.lm), settings, logits, references, workers)
    print(as_text(found))
    if args.out is not None:
        write(found, args.out)
        print(f"written: {args.out}")
    return 0
