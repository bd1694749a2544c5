"""What a search returns: candidate sentences with their scores kept apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lm_server.protocol import Scored


@dataclass(frozen=True)
class Hypothesis:
    """One candidate; all scores are natural logarithms (ln).

    Attributes:
      words: the sentence.
      acoustic: sum over frames of the classes' log-probabilities on the best path, after the blank
        penalty and before the acoustic scale.
      ngram: the word n-gram model's score, sentence end included.
      llm: a large language model's score, or None when none scored it.
      bonus: what the search added for words as such: word bonus and hot words' weights.
    """

    words: tuple[str, ...]
    acoustic: float
    ngram: float
    llm: float | None = None
    bonus: float = 0.0

    @property
    def sentence(self) -> str:
        """The words with single spaces between them."""
        return " ".join(self.words)

    def total(self, acoustic_scale: float) -> float:
        """What the search ranks by: acoustic_scale * acoustic + ngram + bonus."""
        return acoustic_scale * self.acoustic + self.ngram + self.bonus


def rank(
    hypotheses: Iterable[Hypothesis],
    acoustic_scale: float,
    count: int,
    lattice_beam: float = math.inf,
) -> tuple[Hypothesis, ...]:
    """The `count` best distinct word sequences, best first; equal scores in the words' order.

    Those whose total is worse than the best by more than `lattice_beam` (ln) are left out.
    """
    best: dict[tuple[str, ...], Hypothesis] = {}
    # Homophones that the text lacks score the same, and the search gives them in any order.
    for hypothesis in sorted(
        hypotheses, key=lambda one: (-round(one.total(acoustic_scale), 6), one.words)
    ):
        best.setdefault(hypothesis.words, hypothesis)
    kept = tuple(best.values())[:count]
    least = kept[0].total(acoustic_scale) - lattice_beam if kept else 0.0
    return tuple(one for one in kept if one.total(acoustic_scale) >= least)


def scored(hypothesis: Hypothesis, acoustic_scale: float) -> Scored:
    """A candidate as it travels in a final answer."""
    return Scored(
        hypothesis.sentence,
        hypothesis.acoustic,
        hypothesis.ngram,
        hypothesis.llm,
        hypothesis.total(acoustic_scale),
    )
