"""The consensus of several systems as the result of a trial, and the error rate of each system."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from b2txt_jax.metrics import ErrorRate
from lm_server.client.answers import Result as Decoded
from lm_server.hypothesis import Answer, Hypothesis
from lm_server.rescoring.consensus import Consensus


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


def print_systems(rates: Sequence[tuple[str, ErrorRate]], console: Console) -> None:
    """Print the WER of each system, and their mean."""
    for name, rate in rates:
        console.print(f"{name}: WER {rate}", soft_wrap=True, markup=False, highlight=False)
    known = [one.rate for _, one in rates if one.rate is not None]
    if len(known) > 1:
        console.print(f"mean of the {len(known)} systems: {100 * sum(known) / len(known):.2f} %")
