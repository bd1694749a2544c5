"""One sentence per trial out of several systems' sentences or n-best lists.

A system is a run (its newest result), a result of `b2txt evaluate`, the JSON lines of `lm-server
decode`, a submission (.csv) or a text with a sentence a line (.txt). Minimum Bayes risk takes, of
all hypotheses, the one with the fewest word errors to expect. ROVER lets the systems vote word by
word. One system alone is taken by minimum Bayes risk over its own list.

Writes evaluation.json, answers.jsonl and submission.csv, as `b2txt evaluate` does.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from b2txt_jax.data.trial import SPLITS, listed
from b2txt_jax.evaluation.combine import as_result, print_systems
from b2txt_jax.evaluation.command import (
    check_replaceable,
    check_results,
    print_results,
    write_results,
)
from b2txt_jax.evaluation.evaluate import Evaluation, evaluate
from b2txt_jax.evaluation.results import (
    Result,
    ResultsError,
    SavedTrial,
    read_answers,
    result_of,
)
from b2txt_jax.evaluation.submission import read_texts
from b2txt_jax.metrics import total, word_error_rates
from b2txt_jax.provenance import provenance
from lm_server.files.answers_file import scored_nbest
from lm_server.rescoring.consensus import METHODS, Consensus, Scored, agree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt consensus`."""
    parser.add_argument("systems", nargs="+", type=Path, metavar="SYSTEM", help="as above")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--method", choices=METHODS, default="mbr", help="mbr: minimum Bayes risk (default mbr)"
    )
    parser.add_argument("--split", choices=SPLITS[1:], default="val", help="(default val)")
    parser.add_argument(
        "--nbest", type=int, default=100, help="mbr: hypotheses of each system (default 100)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="mbr: of the totals, besides that of each system's confidences; above 1 trusts the "
        "first hypotheses less (default 1)",
    )
    parser.add_argument("--force", action="store_true", help="replace a result of other settings")


def run(args: argparse.Namespace) -> int:
    """Run `b2txt consensus`. Return exit status 1 when trials have no sentence."""
    if args.nbest < 1 or not (args.temperature > 0 and math.isfinite(args.temperature)):
        raise ResultsError(
            f"--nbest is {args.nbest}, --temperature {args.temperature}; needed 1 or more, and a "
            "number above 0"
        )
    check_results(args.out)
    settings = {
        "consensus": args.method,
        "systems": [str(path.absolute()) for path in args.systems],
        **({"nbest": args.nbest, "temperature": args.temperature} if args.method == "mbr" else {}),
    }
    check_replaceable(args.out, settings, args.force)
    systems = read_systems(args.systems, args.split)
    names = trial_names(systems)
    if not names:
        raise ResultsError(f"{args.systems[0]} has no trial; needed at least one")
    console = Console()
    missing = [(one.name, n) for one in systems if (n := len(names) - len(one.of(names)))]
    for name, count in missing:
        console.print(
            f"warning: {name} has no sentence for {count} of {len(names)} trials; the others vote",
            soft_wrap=True,
            markup=False,
        )
    found = agreed(systems, names, args.method, args.temperature, args.nbest)
    result = scored(found, systems, names, args.split, settings)
    write_results(args.out, result)
    _print_each(systems, names, console)
    print_results(result, console)
    if result.wer is not None:
        console.print(f"WER of the {args.method} consensus: {result.wer.all}")
    console.print(f"written: {args.out}", soft_wrap=True)
    return 1 if result.failed else 0


@dataclass(frozen=True)
class System:
    """One system's hypotheses, best first, by trial. `result` where it is one of ours."""

    name: str
    hypotheses: Mapping[str, Sequence[Scored]]
    result: Result | None = None
    numbered: bool = False
    """Whether the trials are numbers of lines."""

    def of(self, names: Sequence[str]) -> dict[str, Sequence[Scored]]:
        """Return the hypotheses of these trials, of which line n has the n-th, without failures."""
        found = {
            name: self.hypotheses.get(str(line) if self.numbered else name, ())
            for line, name in enumerate(names)
        }
        return {name: some for name, some in found.items() if some}


def read_systems(paths: Sequence[Path], split: str = "val") -> list[System]:
    """Read several systems.

    Raises:
      ResultsError: one is given twice, or cannot be read.
    """
    systems = [read_system(path, split) for path in paths]
    read = Counter(
        (path if one.result is None else one.result.folder).resolve()
        for path, one in zip(paths, systems, strict=True)
    )
    twice = [path for path, count in read.items() if count > 1]
    if twice:
        raise ResultsError(
            f"{twice[0]} is given more than once, and would count twice; needed once"
        )
    return systems


def read_system(path: Path, split: str = "val") -> System:
    """Read a run, a result, answers, a submission or a text.

    Raises:
      ResultsError: it cannot be read as what its name says.
    """
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise ResultsError(f"there is no {path}; needed the JSON lines of `lm-server decode`")
        answers = read_answers(path)
        return System(str(path), {trial: scored_nbest(one) for trial, one in answers.items()})
    if path.suffix in (".csv", ".txt"):
        texts = read_texts(path)
        lines = {str(line): [(text, None)] if text else [] for line, text in enumerate(texts)}
        return System(str(path), lines, numbered=True)
    result = result_of(path, split)
    found = result.content.get("split")
    if found != split:
        raise ResultsError(f"{result.folder} is of the {found} split; needed {split}: see --split")
    trials = {one.trial: _of_trial(one) for one in result.trials}
    return System(str(path), trials, result)


def _of_trial(trial: SavedTrial) -> list[Scored]:
    if trial.answer:
        return scored_nbest(trial.answer)
    return [] if trial.decoded is None else [(trial.decoded, None)]


def trial_names(systems: Sequence[System]) -> list[str]:
    """Return the trials, in the order of the first system that names them.

    Raises:
      ResultsError: the systems are not of the same trials.
    """
    named = [one for one in systems if not one.numbered]
    names = list((named or systems)[0].hypotheses)
    for one in systems:
        same = len(one.hypotheses) == len(names) if one.numbered else {*one.hypotheses} == {*names}
        # `lm-server decode` leaves out trials that it could not decode.
        if not same and not (not one.numbered and {*one.hypotheses} < {*names}):
            other = [name for name in one.hypotheses if name not in names]
            raise ResultsError(
                f"{one.name} has {len(one.hypotheses)} trials, {(named or systems)[0].name} has "
                f"{len(names)}{': only the former has ' + listed(other) if other and named else ''}"
                "; needed the same split of the same data, the most complete one first"
            )
    return names


def agreed(
    systems: Sequence[System],
    names: Sequence[str],
    method: str = "mbr",
    temperature: float = 1.0,
    nbest: int = 100,
) -> dict[str, Consensus]:
    """Return the consensus of each trial for which a system has a sentence."""
    columns = [one.of(names) for one in systems]
    found = {}
    for name in names:
        one = agree([column.get(name, ()) for column in columns], method, temperature, nbest)
        if one is not None:
            found[name] = one
    return found


def scored(
    found: Mapping[str, Consensus],
    systems: Sequence[System],
    names: Sequence[str],
    split: str,
    settings: Mapping[str, object],
) -> Evaluation:
    """Score a consensus against the truth of the first system that has one."""
    results = [as_result(name, found.get(name)) for name in names]
    source = next((one.result for one in systems if one.result), None)
    trials = {} if source is None else {one.trial: one for one in source.trials}
    true = [trials[name].true for name in names if name in trials]
    known = [text for text in true if text is not None]
    complete = len(known) == len(names)
    seen = {one.true for one in trials.values() if one.seen and one.true is not None}
    is_known = any(one.seen is not None for one in trials.values())
    return evaluate(
        split=split,
        results=results,
        logits=None,
        sentences=known if complete else None,
        corpora=[trials[name].corpus for name in names] if complete else None,
        train_sentences=seen if complete and is_known else None,
        settings=dict(settings),
        made=provenance(),
    )


def _print_each(systems: Sequence[System], names: Sequence[str], console: Console) -> None:
    truth = next((one.result for one in systems if one.result), None)
    if truth is None:
        return
    true = {one.trial: one.true for one in truth.trials}
    if any(true.get(name) is None for name in names):
        return
    rates = []
    for one in systems:
        found = one.of(names)
        texts = [found[name][0][0] if name in found else "" for name in names]
        said = [true[name] or "" for name in names]
        rates.append((one.name, total(word_error_rates(said, texts))))
    print_systems(rates, console)
