"""Correct decoded sentences by a large language model, where the decoders are unsure.

The model reads the n-best list of a sentence, or the first sentences of several systems, and
replies with one sentence. It is asked where the confidence is below --below. Its reply is used if
its words are in the list or in the vocabulary of --lm, if few words differ from a sentence of the
list, and if no word that the decoders are sure of is changed. Otherwise the decoders' sentence
stays. What became of every sentence is counted, and stands in its line under `correction`.

Of several --answers, the decoders' sentence and its confidence are those of minimum Bayes risk over
all lists. With --refs the word error rates before and after are printed. An interrupted run goes on
with the same command.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_server.files.answers_file import AnswersFileError, read_answers
from lm_server.files.atomic_file import require_writable
from lm_server.process import cleaning_up_when_terminated, version
from lm_server.rescoring.consensus import together
from lm_server.rescoring.correction import (
    CONFIDENT,
    EMPTY,
    OUTCOMES,
    Gate,
    candidates,
    is_confident,
    outcome,
    with_outcome,
)
from lm_server.rescoring.load import add_llm_options
from lm_server.rescoring.scorer import find_model
from lm_server.settings import SettingsError

if TYPE_CHECKING:
    from lm_server.rescoring.causal_lm import CausalLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--answers",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines of `lm-server decode`, or answers.jsonl of `b2txt evaluate`; of several "
        "systems, the same trials",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON lines to write"
    )
    add_llm_options(parser, "ask", scores=False)
    parser.add_argument(
        "--lm", type=Path, metavar="DIR", help="model folder whose vocabulary may be used too"
    )
    parser.add_argument(
        "--nbest",
        type=int,
        metavar="N",
        help="sentences of each system that the model reads, as of `b2txt correction-data` "
        "(default: 10 of one system, 1 of several)",
    )
    parser.add_argument(
        "--below",
        type=float,
        default=Gate.confidence,
        metavar="CONFIDENCE",
        help=f"correct sentences below it (default {Gate.confidence:g})",
    )
    parser.add_argument(
        "--keep-words",
        type=float,
        default=Gate.word_confidence,
        metavar="CONFIDENCE",
        help=f"words from this confidence on stay (default {Gate.word_confidence:g})",
    )
    parser.add_argument(
        "--max-edits",
        type=int,
        default=Gate.edits,
        metavar="N",
        help=f"words that may differ from the nearest sentence of the list (default {Gate.edits})",
    )
    parser.add_argument(
        "--refs",
        type=Path,
        metavar="FILE",
        help="true sentences to count errors with: lines trial<TAB>sentence, JSON lines or CSV "
        "with trial and sentence, or .npz of `b2txt infer`",
    )
    parser.add_argument(
        "--restart", action="store_true", help="drop what an interrupted run to --out has done"
    )


def run(args: argparse.Namespace) -> int:
    """Correct the sentences."""
    from rich.console import Console
    from rich.progress import track

    from lm_server.files.resumable import resumable
    from lm_server.rescoring.load import load_scorer
    from lm_server.tuning.references import read_references

    if args.llm is None:
        raise SettingsError("there is no model to ask: add --llm DIR")
    gate = Gate(args.below, args.keep_words, args.max_edits)
    nbest = (1 if len(args.answers) > 1 else 10) if args.nbest is None else args.nbest
    if not (nbest >= 1 and gate.edits >= 0 and gate.confidence >= 0 and gate.word_confidence >= 0):
        raise SettingsError(
            f"--nbest is {nbest}, --max-edits {gate.edits}, --below {gate.confidence:g}, "
            f"--keep-words {gate.word_confidence:g}; needed 1 or more, and none below 0"
        )
    require_writable(args.out, inputs=[*args.answers, *([args.refs] if args.refs else [])])
    systems = _read(args.answers)
    references = read_references(args.refs) if args.refs else {}
    vocabulary = _vocabulary(args.lm)
    find_model(args.llm)  # A wrong folder is reported before the work.
    model = functools.cache(lambda: load_scorer(args.llm, args.llm_device, "auto", args.llm_dtype))
    with (
        cleaning_up_when_terminated(),
        resumable(args.out, _fingerprints(args, gate, nbest), args.restart) as answers,
    ):
        left = [trial for trial in systems[0] if trial not in answers.done]
        if answers.done:
            print(f"resuming: {len(answers.done)} sentences are in {answers.path}", file=sys.stderr)
        try:
            for trial in track(left, "correcting", console=Console(stderr=True)):
                of_trial = [one[trial] for one in systems if trial in one]
                answers.add(_corrected(of_trial, nbest, gate, vocabulary, model))
        except BaseException:
            answers.interrupted()
            raise
        answers.finish(args.out, systems[0])
    done = list(read_answers(args.out).values())
    _print_outcomes(done)
    if references:
        _print_errors(systems, done, references)
    return 0


def _read(paths: Sequence[Path]) -> list[dict[str, dict[str, Any]]]:
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise AnswersFileError(f"--answers names {twice[0]} twice; needed each system once")
    systems = [read_answers(path) for path in paths]
    for path, one in zip(paths[1:], systems[1:], strict=True):
        other = next((trial for trial in one if trial not in systems[0]), None)
        if other is not None:
            raise AnswersFileError(
                f"{path} has the trial {other}, which {paths[0]} lacks; needed the same trials of "
                "all systems, the most complete one first"
            )
    return systems


def _vocabulary(folder: Path | None) -> frozenset[str]:
    if folder is None:
        return frozenset()
    from lm_server.lexicon.pronunciations import read_lexicon

    return frozenset(read_lexicon(folder / "lexicon.txt").entries)


def _corrected(
    answers: Sequence[Mapping[str, Any]],
    nbest: int,
    gate: Gate,
    vocabulary: frozenset[str],
    model: Callable[[], CausalLM],
) -> dict[str, Any]:
    """Return the answer to a trial with what became of it. `model` returns the model."""
    own = together(answers)
    listed = candidates([[h["sentence"] for h in one["nbest"]] for one in answers], nbest)
    if not own["sentence"]:
        return with_outcome(own, EMPTY, None)
    if is_confident(own.get("confidence"), gate):
        return with_outcome(own, CONFIDENT, None)
    from lm_server.rescoring.corrector import reply

    text, refused = reply(model(), listed)
    found = refused or outcome(
        text, own["sentence"], listed, own.get("word_confidences") or (), gate, vocabulary
    )
    return with_outcome(own, found, text)


def _fingerprints(args: argparse.Namespace, gate: Gate, nbest: int) -> dict[str, str]:
    from lm_server.tuning.cache import digest

    return {
        "version of lm-server": version(),
        "--answers": " ".join(map(digest, args.answers)),
        "--llm": f"{digest(find_model(args.llm))} {args.llm_device} {args.llm_dtype}",
        "--lm": digest(args.lm / "lexicon.txt") if args.lm else "",
        "--below, --keep-words or --max-edits": str(gate),
        "--nbest": str(nbest),
    }


def _print_outcomes(done: Sequence[Mapping[str, Any]]) -> None:
    counts = Counter(one["correction"]["outcome"] for one in done)
    for name, meaning in OUTCOMES.items():
        if counts[name]:
            print(f"{counts[name]:6} {name}: {meaning}")


def _print_errors(
    systems: Sequence[Mapping[str, Mapping[str, Any]]],
    done: Sequence[Mapping[str, Any]],
    references: Mapping[str, tuple[str, ...]],
) -> None:
    from lm_server.tuning.references import known_trials, word_errors

    known = [done[n] for n in known_trials([one["trial"] for one in done], references)]
    missing = len(references) - len(known)
    if missing:
        print(
            f"warning: {missing} trials with a true sentence have no answer: left out",
            file=sys.stderr,
        )
    words = sum(len(references[one["trial"]]) for one in known)
    if not words:
        return
    before = [together([s[one["trial"]] for s in systems if one["trial"] in s]) for one in known]
    counts = []
    for name, texts in (("before", before), ("after", known)):
        errors = sum(
            word_errors(references[one["trial"]], text["sentence"])
            for one, text in zip(known, texts, strict=True)
        )
        counts.append(f"{name} {100 * errors / words:.2f} % ({errors}/{words})")
    print(f"WER of {len(known)} sentences: {', '.join(counts)}")
