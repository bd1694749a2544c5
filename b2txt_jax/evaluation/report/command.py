"""Write one page about runs: learning curves, error rates, phonemes, confidences, trials, origin.

The page needs no other file and no network, and every figure on it can be saved as SVG. Words and
n-best lists are those of the newest result of `b2txt evaluate` for each run's checkpoint. What is
missing is named on the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from b2txt_jax.evaluation.report.inputs import distinguished, report_run
from b2txt_jax.evaluation.report.page import write_report
from b2txt_jax.evaluation.results import ResultsError, read_result
from b2txt_jax.inference.run import add_weights_argument
from lm_server.files.atomic_file import require_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of `b2txt train`")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="page to write")
    parser.add_argument(
        "--result",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="result of `b2txt evaluate` in another folder than RUN/val, with one RUN only",
    )
    parser.add_argument(
        "--no-logits",
        action="store_true",
        help="compute no logits: no pictures, confusions and confidences of phonemes",
    )
    parser.add_argument("--title", default="", help="of the page (default: the runs' names)")
    add_weights_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run `b2txt report`."""
    if args.result and len(args.runs) > 1:
        raise ResultsError(
            f"found --result with {len(args.runs)} runs; needed one run, or results in RUN/val"
        )
    require_writable(args.out)
    results = [read_result(folder) for folder in args.result] if args.result else None
    console = Console(stderr=True)
    runs = distinguished(
        [
            report_run(
                folder,
                results,
                logits=not args.no_logits,
                weights=args.weights,
                console=console,
            )
            for folder in args.runs
        ]
    )
    for note in write_report(args.out, runs, args.title):
        console.print(f"missing: {note}", soft_wrap=True, markup=False, highlight=False)
    print(f"{args.out}: {len(runs)} run(s), {args.out.stat().st_size / 1e6:.2f} MB")
    return 0
