"""Why is a decoded sentence wrong? One cause for every wrong sentence, and their counts.

The scores of the truth (`lm_server.search.forced`) are compared with those of the search's answer.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_server.files.atomic_file import replacing
from lm_server.files.logits_file import Logits
from lm_server.hypothesis import Hypothesis
from lm_server.lm.reader import find_words
from lm_server.offline import decode_trial, searched
from lm_server.protocol import to_lm_order
from lm_server.search.flashlight import LanguageModel
from lm_server.search.forced import Known, forced
from lm_server.settings import LIMITS, Settings
from lm_server.tuning.references import known_trials, word_errors

CAUSES: Mapping[str, str] = {
    "vocabulary": "a word of the truth is not in the vocabulary",
    "frames": "there are too few frames for the truth",
    "search": "the truth's total is better than the answer's: the search has lost it",
    "homophone": "truth and answer are said alike",
    "language model": "the truth's acoustics are not worse, and the n-gram model outweighs them",
    "acoustics": "the answer's acoustics are better, and outweigh the n-gram model if need be",
}
"""Causes in the order in which they are tried, each with its meaning."""
_ROUNDING = 1e-2
"""Totals (ln) that differ by less are equal: the search adds in single precision."""


@dataclass(frozen=True)
class Diagnosis:
    """One sentence. Scores are None where there is no such hypothesis.

    Attributes:
      trial: its name.
      cause: one of `CAUSES`. None: the sentence is right.
      mended_by: of a search error, the wider setting that finds a total as good as the truth's.
      truth, answer: sentences.
      words, errors: of the truth, and edits between both.
      oracle_errors: edits of the list's nearest hypothesis.
      prefers_truth: whether the n-gram model prefers the truth.
      truth_acoustic, truth_ngram, truth_total: scores (ln) of the truth.
      answer_acoustic, answer_ngram, answer_total: scores (ln) of the answer.
    """

    trial: str
    cause: str | None
    mended_by: str | None
    truth: str
    answer: str
    words: int
    errors: int
    oracle_errors: int
    prefers_truth: bool | None
    truth_acoustic: float | None
    truth_ngram: float | None
    truth_total: float | None
    answer_acoustic: float | None
    answer_ngram: float | None
    answer_total: float | None


def diagnose(
    model: LanguageModel,
    settings: Settings,
    logits: Logits,
    references: Mapping[str, tuple[str, ...]],
    workers: int = 1,
) -> list[Diagnosis]:
    """Search every trial that has a reference, and find the cause of every wrong answer.

    Raises:
      ReferencesError: none has.
    """
    chosen = logits.select(known_trials(logits.trials, references))
    with searched(model, settings, chosen, workers) as outcomes:
        lists = [outcome.hypotheses for outcome in outcomes]
    known = find_words(
        model.folder,
        {word for trial in chosen.trials for word in references[trial]}
        | {word for some in lists for one in some[:1] for word in one.words},
    )
    return [
        _diagnosis(model, known, settings, trial, chosen, index, some, references[trial])
        for index, (trial, some) in enumerate(zip(chosen.trials, lists, strict=True))
    ]


def _diagnosis(
    model: LanguageModel,
    known: Known,
    settings: Settings,
    trial: str,
    logits: Logits,
    index: int,
    found: Sequence[Hypothesis],
    words: tuple[str, ...],
) -> Diagnosis:
    errors = [word_errors(words, one.sentence) for one in found] or [len(words)]
    answer = found[0] if found else None
    frames = logits.of(index)
    truth = None
    if errors[0] and all(word in known for word in words):
        truth = forced(model, known, settings, to_lm_order(frames), words)
    cause = cause_of(words, answer, truth, known) if errors[0] else None
    mended = None
    if cause == "search" and truth is not None:
        mended = _mending(model, settings, truth, trial, frames)
    return Diagnosis(
        trial,
        cause,
        mended,
        " ".join(words),
        answer.sentence if answer else "",
        len(words),
        errors[0],
        min(errors),
        truth.ngram > answer.ngram if truth and answer else None,
        *(getattr(truth, name, None) for name in ("acoustic", "ngram", "total")),
        *(getattr(answer, name, None) for name in ("acoustic", "ngram", "total")),
    )


def cause_of(
    words: Sequence[str], answer: Hypothesis | None, truth: Hypothesis | None, known: Known
) -> str:
    """Return the cause of a wrong answer.

    Args:
      words: the true sentence.
      answer: the search's best hypothesis. None: it found none.
      truth: the true sentence with its scores. None: it cannot be scored.
      known: the words of both that the vocabulary has.
    """
    if any(word not in known for word in words):
        return "vocabulary"
    if truth is None or truth.total is None:
        return "frames"
    if answer is None or answer.total is None or truth.total > answer.total + _ROUNDING:
        return "search"
    if len(words) == len(answer.words) and all(
        one == other or not set(known[one][1]).isdisjoint(known[other][1])
        for one, other in zip(words, answer.words, strict=True)
    ):
        return "homophone"
    return "language model" if truth.acoustic >= answer.acoustic else "acoustics"


def _mending(
    model: LanguageModel, settings: Settings, truth: Hypothesis, trial: str, frames: Any
) -> str:
    """Return the first change of settings that finds a total as good as the truth's."""
    changes: dict[str, dict[str, float]] = {
        "max_classes": {"max_classes": 41},
        "beam": {"beam": min(3 * settings.beam, LIMITS["beam"][1])},
        "max_active": {"max_active": int(min(5 * settings.max_active, LIMITS["max_active"][1]))},
    }
    changes["all of them"] = {
        name: value for one in changes.values() for name, value in one.items()
    }
    for name, change in changes.items():
        search = model.search(dataclasses.replace(settings, **change))  # type: ignore[arg-type]
        best = decode_trial(search, trial, frames).hypotheses
        if best and (best[0].total or 0.0) >= (truth.total or 0.0) - _ROUNDING:
            return name
    return "none tried"


def summary(found: Sequence[Diagnosis]) -> dict[str, Any]:
    """Return counts and rates. A rate of nothing is None."""
    words = sum(one.words for one in found)
    wrong = [one for one in found if one.cause]

    def rate(count: int, of: int) -> float | None:
        return round(count / of, 6) if of else None

    causes = {}
    for cause, meaning in CAUSES.items():
        some = [one for one in wrong if one.cause == cause]
        causes[cause] = {
            "meaning": meaning,
            "sentences": len(some),
            "share": rate(len(some), len(wrong)),
            "errors": sum(one.errors for one in some),
            "truth_in_list": sum(one.oracle_errors == 0 for one in some),
            "ngram_prefers_truth": sum(bool(one.prefers_truth) for one in some),
        }
    mended = [one.mended_by for one in wrong if one.mended_by]
    return {
        "sentences": len(found),
        "wrong": len(wrong),
        "words": words,
        "errors": sum(one.errors for one in found),
        "wer": rate(sum(one.errors for one in found), words),
        "oracle_wer": rate(sum(one.oracle_errors for one in found), words),
        "causes": causes,
        "search_errors_mended_by": {name: mended.count(name) for name in sorted(set(mended))},
    }


def as_text(found: Sequence[Diagnosis]) -> str:
    """Return the table of causes."""
    total = summary(found)
    lines = ["cause           sentences   share  word errors  truth in list  n-gram prefers truth"]
    lines += [
        f"{cause:15} {one['sentences']:9} {one['share'] or 0:7.1%} {one['errors']:12} "
        f"{one['truth_in_list']:14} {one['ngram_prefers_truth']:21}"
        for cause, one in total["causes"].items()
    ]
    if total["search_errors_mended_by"]:
        mended = ", ".join(f"{k}: {n}" for k, n in total["search_errors_mended_by"].items())
        lines += ["", f"search errors by the wider setting that mends them: {mended}"]
    lines += ["", f"{total['wrong']} of {total['sentences']} sentences are wrong"]
    if total["wer"] is not None:
        lines[-1] += (
            f": {total['errors']} errors in {total['words']} words, WER {total['wer']:.2%}, "
            f"n-best oracle {total['oracle_wer']:.2%}"
        )
    return "\n".join(lines)


def write(found: Sequence[Diagnosis], path: Path) -> None:
    """Write every sentence as CSV, or with the summary as JSON, by the name's ending."""
    rows = [dataclasses.asdict(one) for one in found]
    if path.suffix == ".csv":
        text = io.StringIO()
        table = csv.DictWriter(text, [field.name for field in dataclasses.fields(Diagnosis)])
        table.writeheader()
        table.writerows(rows)
        content = text.getvalue()
    else:
        content = json.dumps({**summary(found), "trials": rows}, indent=2) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
