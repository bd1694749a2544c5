"""Answers of candidates, waited for."""

import contextlib

from lm_server.hypothesis import Answer, Hypothesis
from lm_server.rescoring.answering import Answering
from lm_server.rescoring.scorer import SentenceScorer
from lm_server.settings import Settings


def answer_of(
    hypotheses: list[Hypothesis] | tuple[Hypothesis, ...],
    settings: Settings,
    scorer: SentenceScorer | None = None,
    context: str = "",
) -> Answer:
    """Augment, rescore with a scorer, and rank."""
    with contextlib.closing(Answering(scorer)) as answering:
        return answering.submit(hypotheses, settings, context).result()
