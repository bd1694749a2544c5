"""Write a submission to a benchmark from a result, and check all that the benchmark would refuse.

The result is a run (its newest result of the test split), a folder of `b2txt evaluate --split test`
or `b2txt consensus`, or a submission that exists. --out NAME.csv is in the format of Brain-to-Text
'25 (T15): id,text with ids from 0. --out NAME.txt is in that of '24 (T12): a sentence a line.
Sentences are written as they are scored: lower case, without punctuation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from b2txt_jax.data.trial import SPLITS, listed
from b2txt_jax.evaluation.results import ResultsError, SavedTrial, result_of
from b2txt_jax.evaluation.submission import read_texts, write_submission
from lm_server.files.atomic_file import require_writable
from lm_server.lexicon.text_rules import normalise

PUBLISHED = {".csv": 1450, ".txt": 1200}
"""Sentences that the benchmarks of T15 and T12 hold out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt submit`."""
    parser.add_argument("result", type=Path, metavar="RESULT", help="as above")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help=".csv for T15, .txt for T12"
    )
    parser.add_argument("--split", choices=SPLITS[1:], default="test", help="(default test)")
    parser.add_argument(
        "--rows",
        type=int,
        help="sentences that must be there (default: the benchmark's, 1450 or 1200)",
    )
    parser.add_argument(
        "--fill", metavar="TEXT", help="what empty sentences become (default: they are an error)"
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt submit`."""
    if args.out.suffix not in PUBLISHED:
        raise ResultsError(f"--out is {args.out}; needed a name that ends in .csv or .txt")
    require_writable(args.out, inputs=[args.result])
    names, texts = _texts(args.result, args.split)
    wanted = PUBLISHED[args.out.suffix] if args.rows is None else args.rows
    if len(texts) != wanted:
        raise ResultsError(
            f"{args.result} has {len(texts)} sentences of {_sessions(names)}; needed {wanted}: a "
            f"missing or surplus trial shifts all ids after it. --rows {len(texts)} accepts them, "
            "for data that are not the published ones"
        )
    written = [normalise(text) for text in texts]
    changed = sum(a != b for a, b in zip(written, texts, strict=True))
    empty = [name for name, text in zip(names, written, strict=True) if not text]
    fill = normalise(args.fill or "")
    if empty and not fill:
        raise ResultsError(
            f"{len(empty)} of {len(texts)} sentences are empty, and Kaggle refuses such a file "
            f"(Submission contains null values): {listed(empty)}; needed words: decode these "
            "trials again, or --fill WORD"
        )
    write_submission(args.out, [text or fill for text in written])
    read = read_texts(args.out)
    if len(read) != wanted or not all(read):
        raise ResultsError(f"{args.out} was not written as it should be; look at the disk")
    print(
        f"{args.out}: {len(read)} sentences, {changed} of them changed to how they are scored, "
        f"{len(empty)} filled with {fill!r}"
        if empty
        else f"{args.out}: {len(read)} sentences, {changed} of them changed to how they are scored"
    )
    return 0


def _texts(path: Path, split: str) -> tuple[list[str], list[str]]:
    """Return the trials (or numbers of lines) and their sentences, in the published order."""
    if path.suffix in PUBLISHED:
        texts = read_texts(path)
        return [f"line {number}" for number in range(1, len(texts) + 1)], texts
    result = result_of(path, split)
    found = result.content.get("split")
    if found != split:
        raise ResultsError(
            f"{result.folder} is of the {found} split; needed {split}: evaluate with --split "
            f"{split}, or give --split {found}"
        )
    order = sorted(result.trials, key=lambda one: one.trial)
    if [one.trial for one in order] != [one.trial for one in result.trials]:
        wrong: SavedTrial = next(
            b for a, b in zip(order, result.trials, strict=True) if a.trial != b.trial
        )
        raise ResultsError(
            f"{result.folder} has its trials in another order than the published one, the first is "
            f"{wrong.trial}; needed sessions by date, then trials by number: evaluate again"
        )
    return [one.trial for one in result.trials], [one.decoded or "" for one in result.trials]


def _sessions(names: list[str]) -> str:
    days = {name.split("/")[0] for name in names if "/" in name}
    return f"{len(days)} sessions" if days else "an unknown number of sessions"
