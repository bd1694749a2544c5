"""Candidate sentences and answers, the same types from the search to the client."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Hypothesis:
    """One candidate sentence. All scores are natural logarithms (ln), kept apart.

    Attributes:
      words: the sentence.
      acoustic: sum over frames of the classes' log-probabilities on the best path, after the blank
        penalty and before the acoustic scale.
      ngram: score of the word n-gram model, sentence end included.
      llm: score of a large language model. None: not scored.
      bonus: what the search added for words as such (word bonus, weights of hot words).
      total: what the candidate is ranked by. None: not ranked yet.
    """

    words: tuple[str, ...]
    acoustic: float
    ngram: float
    llm: float | None = None
    bonus: float = 0.0
    total: float | None = None

    @property
    def sentence(self) -> str:
        """The words joined by single spaces."""
        return " ".join(self.words)


class Word(NamedTuple):
    """A word of an answer. `confidence` is None where the server sends none."""

    text: str
    confidence: float | None


@dataclass(frozen=True)
class Answer:
    """The ranked candidates of one sentence.

    Attributes:
      hypotheses: distinct, best first. Empty when the search found none.
      confidence: probability that the first is right, given that one of them is. None: unknown.
      word_confidences: for each word of the first, the probability of the candidates that have it
        in its place. Empty: unknown.
      rescored: whether a large language model's scores are in the ranking.
      problem: why they are not, although they should be. None when nothing went wrong.
      temperature: by which the totals are divided for the confidences. None: unknown.
    """

    hypotheses: tuple[Hypothesis, ...]
    confidence: float | None = None
    word_confidences: tuple[float, ...] = ()
    rescored: bool = False
    problem: str | None = None
    temperature: float | None = None

    @property
    def sentence(self) -> str:
        """The best sentence. Empty when there is none."""
        return self.hypotheses[0].sentence if self.hypotheses else ""

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of the best sentence with their confidences."""
        words = self.hypotheses[0].words if self.hypotheses else ()
        confidences = self.word_confidences or (None,) * len(words)
        return tuple(map(Word, words, confidences))

    def as_json(self) -> dict[str, Any]:
        """Return everything in types that JSON has. A missing score is None."""
        return {
            "sentence": self.sentence,
            "confidence": self.confidence,
            "word_confidences": list(self.word_confidences),
            "rescored": self.rescored,
            "problem": self.problem,
            "temperature": self.temperature,
            "nbest": [
                {
                    "sentence": one.sentence,
                    "acoustic": one.acoustic,
                    "ngram": one.ngram,
                    "bonus": one.bonus,
                    "llm": one.llm,
                    "total": one.total,
                }
                for one in self.hypotheses
            ],
        }


def rank(
    hypotheses: Iterable[Hypothesis],
    acoustic_scale: float,
    count: int,
    lattice_beam: float = math.inf,
) -> tuple[Hypothesis, ...]:
    """Return the `count` best distinct word sequences by the search's own scores, best first.

    Their total becomes acoustic_scale * acoustic + ngram + bonus. Candidates whose total is worse
    than the best by more than `lattice_beam` (ln) are left out.
    """
    best: dict[tuple[str, ...], Hypothesis] = {}
    for one in in_order(
        dataclasses.replace(one, total=acoustic_scale * one.acoustic + one.ngram + one.bonus)
        for one in hypotheses
    ):
        best.setdefault(one.words, one)
    kept = list(best.values())[:count]
    least = _total(kept[0]) - lattice_beam if kept else 0.0
    return tuple(one for one in kept if _total(one) >= least)


def in_order(hypotheses: Iterable[Hypothesis]) -> list[Hypothesis]:
    """Return ranked candidates, best total first. Equal totals stand in the words' order."""
    # Homophones that the text lacks score the same, and the search finds them in any order.
    return sorted(hypotheses, key=lambda one: (-round(_total(one), 6), one.words))


def _total(hypothesis: Hypothesis) -> float:
    assert hypothesis.total is not None
    return hypothesis.total
