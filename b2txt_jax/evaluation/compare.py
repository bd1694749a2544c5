"""Compare two runs, or two results of `b2txt evaluate`, on the same sentences.

Prints both rates, their difference with a paired bootstrap over recording days, the matched-pairs
test of NIST (MAPSSWE, segments between words that both have right), a sign test over sentences, and
the sentences that changed. Of a run, the newest result is taken.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from b2txt_jax.data.trial import SPLITS, listed
from b2txt_jax.evaluation.intervals import LEAST_DAYS, Paired, paired_bootstrap
from b2txt_jax.evaluation.results import Result, ResultsError, SavedTrial, result_of
from b2txt_jax.metrics import ErrorRate, differences, total
from b2txt_jax.provenance import provenance
from lm_server.files.atomic_file import replacing, require_writable
from lm_server.lexicon.text_rules import normalise, scored_words

_CLEAN_WORDS = 2
"""Words in a row that both have right, which end a segment of MAPSSWE."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt compare`."""
    which = "run's folder, or folder of a result of `b2txt evaluate`"
    parser.add_argument("first", type=Path, metavar="A", help=which)
    parser.add_argument("second", type=Path, metavar="B", help=f"{which}, compared with A")
    parser.add_argument("--split", choices=SPLITS[1:], default="val", help="(default val)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default: none)")
    parser.add_argument(
        "--sentences", type=int, default=20, help="changed sentences that are printed (default 20)"
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt compare`."""
    if args.sentences < 0:
        raise ResultsError(f"--sentences is {args.sentences}; needed 0 or more")
    if args.out:
        require_writable(args.out)
    first, second = result_of(args.first, args.split), result_of(args.second, args.split)
    found = compare(first, second)
    print_comparison(found, Console(), args.sentences)
    if args.out:
        origin = {"made": provenance(), "a": str(first.folder), "b": str(second.folder)}
        text = json.dumps({**origin, **asdict(found)}, indent=2, ensure_ascii=False)
        with replacing(args.out) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
    return 0


@dataclass(frozen=True)
class Difference:
    """One kind of error rate, in A and in B.

    Attributes:
      a, b: the rates.
      paired: the difference B - A by a bootstrap. None: too little to draw from.
      matched_pairs_p: two-sided p of the matched-pairs test. None: too few segments differ.
      better, worse, same: sentences with fewer, more, as many errors in B.
      sign_p: two-sided p of a sign test over the sentences that differ.
    """

    a: ErrorRate
    b: ErrorRate
    paired: Paired | None
    matched_pairs_p: float | None
    better: int
    worse: int
    same: int
    sign_p: float


@dataclass(frozen=True)
class Changed:
    """A sentence that was decoded differently. Errors are of words."""

    trial: str
    true: str
    a: str | None
    b: str | None
    errors_a: int
    errors_b: int


@dataclass(frozen=True)
class Comparison:
    """B against A over `trials` trials that both have.

    Attributes:
      only_a, only_b: trials that the other lacks.
      per, wer: None where it is not known of every trial.
      changed: sentences, the most improved first.
    """

    names: tuple[str, str]
    trials: int
    only_a: int
    only_b: int
    per: Difference | None
    wer: Difference | None
    changed: tuple[Changed, ...]


def compare(first: Result, second: Result) -> Comparison:
    """Compare two results.

    Raises:
      ResultsError: they have no trial in common, other sentences were said in one, or there is
        nothing that is known of both.
    """
    ours = {one.trial: one for one in first.trials}
    theirs = {one.trial: one for one in second.trials}
    pairs = [(one, theirs[name]) for name, one in ours.items() if name in theirs]
    if not pairs:
        raise ResultsError(
            f"{first.folder} and {second.folder} have no trial in common; needed results of the "
            f"same split of the same data (the first trials are {', '.join([*ours][:1])} and "
            f"{', '.join([*theirs][:1])})"
        )
    other = [a.trial for a, b in pairs if normalise(a.true or "") != normalise(b.true or "")]
    if other:
        raise ResultsError(
            f"{len(other)} trials of {first.folder} and {second.folder} have other true sentences: "
            f"{listed(other)}; needed results of the same data"
        )
    per = _difference(pairs, "per", None)
    segments = [pair for one in pairs for pair in _segments(*one)]
    wer = _difference(pairs, "wer", segments)
    if per is None and wer is None:
        raise ResultsError(
            f"{first.folder} and {second.folder} have no errors of each trial; needed a split with "
            "labels, evaluated by this version"
        )
    changed = [
        Changed(a.trial, a.true or "", a.decoded, b.decoded, a.wer.errors, b.wer.errors)
        for a, b in pairs
        if a.wer and b.wer and normalise(a.decoded or "") != normalise(b.decoded or "")
    ]
    changed.sort(key=lambda one: one.errors_b - one.errors_a)
    both = len(pairs)
    names = _names(first, second)
    left = len(ours) - both, len(theirs) - both
    return Comparison(names, both, *left, per, wer, tuple(changed))


def _names(first: Result, second: Result) -> tuple[str, str]:
    paths = [one.folder.absolute().parts for one in (first, second)]
    for depth in range(1, max(map(len, paths)) + 1):
        names = tuple("/".join(parts[-depth:]) for parts in paths)
        if names[0] != names[1]:
            return names[0], names[1]
    return "A", "B"


def _difference(
    pairs: Sequence[tuple[SavedTrial, SavedTrial]],
    kind: str,
    segments: Sequence[tuple[int, int]] | None,
) -> Difference | None:
    first, second = ([getattr(one, kind) for one in some] for some in zip(*pairs, strict=True))
    if None in first or None in second:
        return None
    days = [one.session for one, _ in pairs]
    changes = np.array([b.errors - a.errors for a, b in zip(first, second, strict=True)])
    better, worse = int((changes < 0).sum()), int((changes > 0).sum())
    if segments is None:  # What was decoded is not kept: whole sentences are the segments.
        segments = [(a.errors, b.errors) for a, b in zip(first, second, strict=True)]
    return Difference(
        total(first),
        total(second),
        paired_bootstrap(days, first, second),
        matched_pairs(segments),
        better,
        worse,
        len(pairs) - better - worse,
        sign_test(better, worse),
    )


def _segments(first: SavedTrial, second: SavedTrial) -> list[tuple[int, int]]:
    true = scored_words(first.true or "")
    return error_segments(
        true, scored_words(first.decoded or ""), scored_words(second.decoded or "")
    )


def error_segments(
    true: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[tuple[int, int]]:
    """Return the errors of both systems in each segment of a sentence that has any.

    Segments are parted by two or more words in a row that both systems have right, with nothing
    inserted between, and by the ends of the sentence.

    >>> error_segments("a b c d e".split(), "x b c d e".split(), "x b c d".split())
    [(1, 1), (0, 1)]
    """
    # A place for each gap between words, then for the word after it.
    errors = np.zeros((2, 2 * len(true) + 1), int)
    for row, decoded in zip(errors, (first, second), strict=True):
        word = 0
        for stretch in differences(true, decoded):
            both = len(stretch.reference)
            if not both:
                row[2 * word] += len(stretch.decoded)
            elif not stretch.same:
                row[2 * word + 1 : 2 * (word + both) : 2] += 1
            word += both
    found: list[tuple[int, int]] = []
    clean, current = 0, np.zeros(2, int)
    for place in range(errors.shape[1]):
        here = errors[:, place]
        if here.any():
            if clean >= _CLEAN_WORDS and current.any():
                found.append((int(current[0]), int(current[1])))
                current = np.zeros(2, int)
            clean = 0
            current = current + here
        else:
            clean += place % 2
    return [*found, (int(current[0]), int(current[1]))] if current.any() else found


def matched_pairs(segments: Sequence[tuple[int, int]]) -> float | None:
    """Return the two-sided p of the mean difference of errors, by the normal distribution.

    None with fewer than two segments. Without any difference it is 1.
    """
    if len(segments) < 2:
        return None
    change = np.array([b - a for a, b in segments], float)
    spread = change.std(ddof=1)
    if not spread:
        return 1.0 if not change.any() else None
    z = change.mean() / (spread / math.sqrt(len(change)))
    return math.erfc(abs(z) / math.sqrt(2))


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided p of so many changes for the better and for the worse (McNemar, exact).

    >>> sign_test(0, 5)
    0.0625
    """
    count, least = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(least + 1)) / 2**count
    return min(1.0, 2 * tail)


def print_comparison(found: Comparison, console: Console, sentences: int) -> None:
    """Print a comparison, with so many of the changed sentences."""
    a, b = found.names
    kinds = {"PER": found.per, "WER": found.wer}
    known = {name: kind for name, kind in kinds.items() if kind}
    table = Table("", *known, title=f"{found.trials} trials: A is {a}, B is {b}")
    table.add_row("A", *(str(kind.a) for kind in known.values()))
    table.add_row("B", *(str(kind.b) for kind in known.values()))
    table.add_row("B - A", *map(_change, known.values()))
    table.add_row("p, bootstrap", *(_p(k.paired and k.paired.p) for k in known.values()))
    table.add_row("p, matched pairs", *(_p(kind.matched_pairs_p) for kind in known.values()))
    counts = (f"{k.better} better, {k.worse} worse, {k.same} same" for k in known.values())
    table.add_row("sentences in B", *counts)
    table.add_row("p, sign test", *(_p(kind.sign_p) for kind in known.values()))
    console.print(table)
    paired = next((kind.paired for kind in known.values() if kind.paired), None)
    if paired and paired.interval.unit == "trials":
        console.print(
            f"of {paired.interval.days} recording days, fewer than {LEAST_DAYS}, single trials are "
            "drawn: interval and p lack the differences between days",
            soft_wrap=True,
        )
    missing = [name for name in kinds if name not in known]
    if missing:
        console.print(
            f"no {missing[0]}: it is not kept of each trial; evaluate again with this version",
            soft_wrap=True,
        )
    if found.only_a or found.only_b:
        console.print(
            f"left out: {found.only_a} trials that only A has, {found.only_b} that only B has"
        )
    console.print(f"{len(found.changed)} sentences changed")
    half = sentences // 2
    shown: Sequence[Changed] = found.changed
    if len(shown) > sentences:
        shown = [*shown[: sentences - half], *(shown[-half:] if half else ())]
    for sentence in shown:
        console.print(
            f"{sentence.trial}  errors {sentence.errors_a} -> {sentence.errors_b}\n"
            f"  true: {sentence.true}\n  A:    {_said(sentence.a)}\n  B:    {_said(sentence.b)}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


def _change(kind: Difference) -> str:
    if kind.a.rate is None or kind.b.rate is None:
        return "-"
    ends = kind.paired.interval if kind.paired else None
    shown = f" ({100 * ends.low:+.2f} to {100 * ends.high:+.2f})" if ends else ""
    return f"{100 * (kind.b.rate - kind.a.rate):+.2f} %{shown}"


def _said(sentence: str | None) -> str:
    return "(failed)" if sentence is None else sentence


def _p(value: Any) -> str:
    return "-" if value is None else f"{value:.2g}"
