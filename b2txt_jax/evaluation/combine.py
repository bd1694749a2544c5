"""One answer to a trial out of several systems' hypotheses, and the error rate of each system."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from b2txt_jax.metrics import ErrorRate
from lm_server.client.answers import Result as Decoded
from lm_server.hypothesis import Answer, Hypothesis
from lm_server.rescoring.consensus import Consensus, Scored, minimum_bayes_risk, rover

METHODS = ("mbr", "rover")


def agree(
    lists: Sequence[Sequence[Scored]],
    method: str = METHODS[0],
    temperature: float = 1.0,
    nbest: int = 100,
) -> Consensus | None:
    """Return the consensus of the systems that have a hypothesis. None: no system has one.

    A single list is always taken by minimum Bayes risk.
    """
    known = [one for one in lists if one]
    if not known:
        return None
    if method == "rover" and len(lists) > 1:
        return rover(known)
    return minimum_bayes_risk(known, temperature, nbest)


def as_result(
    name: str, found: Consensus | None, seconds: float = 0.0, problem: str | None = None
) -> Decoded:
    """Return a consensus as the result of a trial. Its totals are the negative errors to expect.

    `problem`: why a system's list is not rescored, although it should be.
    """
    if found is None:
        return Decoded(name, None, "no system has a sentence", seconds)
    nan = float("nan")
    hypotheses = tuple(
        Hypothesis(tuple(c.sentence.split()), nan, nan, total=-c.expected_errors)
        for c in found.candidates
    )
    words = found.word_confidences
    fits = len(words) == len(hypotheses[0].words)
    share = found.candidates[0].share
    answer = Answer(hypotheses, share, words if fits else (), problem=problem)
    return Decoded(name, answer, None, seconds)


def scored_hypotheses(answer: Answer | None) -> list[Scored]:
    """Return the sentences of an answer with their totals, best first."""
    return [(one.sentence, one.total) for one in answer.hypotheses] if answer else []


def print_systems(rates: Sequence[tuple[str, ErrorRate]], console: Console) -> None:
    """Print the WER of each system, and their mean."""
    for name, rate in rates:
        console.print(f"{name}: WER {rate}", soft_wrap=True, markup=False, highlight=False)
    known = [one.rate for _, one in rates if one.rate is not None]
    if len(known) > 1:
        console.print(f"mean of the {len(known)} systems: {100 * sum(known) / len(known):.2f} %")
