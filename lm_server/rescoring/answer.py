"""From the search's candidates to the answer: augmentation, rescoring, mixing, confidences."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rapidfuzz.distance import Levenshtein

from lm_server.errors import UserError
from lm_server.hypothesis import Hypothesis, rank
from lm_server.protocol import Scored
from lm_server.rescoring.augment import augment
from lm_server.settings import Settings

_LOG = logging.getLogger(__name__)
_NEGLIGIBLE = 1e-9
"""A candidate's probability below which its words are not compared."""


class RescoringError(UserError, RuntimeError):
    """A large language model that cannot be loaded or did not score; says why and what to do."""


class SentenceScorer(Protocol):
    """A large language model that says how probable sentences are."""

    name: str

    def score(
        self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
    ) -> np.ndarray:
        """Log-probabilities (ln), float64 [sentences].

        Args:
          sentences: none of them empty; in the text form of the search (lower case).
          context: what was said before; it is put before every sentence.
          length_penalty: taken from a score for every token (ln).

        Raises:
          RescoringError: not every sentence got a finite score.
        """
        ...


@dataclass(frozen=True)
class Ranked:
    """A candidate and the total (ln) that it is ranked by."""

    hypothesis: Hypothesis
    total: float

    @property
    def sentence(self) -> str:
        """The words with single spaces between them."""
        return self.hypothesis.sentence


@dataclass(frozen=True)
class Answer:
    """What a sentence's logits were decoded to.

    Attributes:
      candidates: distinct, best first; empty when the search found none.
      confidence: probability that the first is right, given that one of them is; None without
        candidates. See `posterior`.
      word_confidences: for each of its words, the probability of the candidates that have it in
        its place.
      rescored: whether `candidates` are ranked with a large language model's scores.
      problem: why they are not, although they should be; None when nothing went wrong.
    """

    candidates: tuple[Ranked, ...]
    confidence: float | None
    word_confidences: tuple[float, ...]
    rescored: bool
    problem: str | None = None

    @property
    def sentence(self) -> str:
        """The best sentence; empty when there is none."""
        return self.candidates[0].sentence if self.candidates else ""

    def scoring(self) -> tuple[Scored, ...]:
        """The candidates as they travel in a final entry."""
        return tuple(
            Scored(
                one.sentence,
                one.hypothesis.acoustic,
                one.hypothesis.ngram,
                one.hypothesis.llm,
                one.total,
            )
            for one in self.candidates
        )

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON can carry it; a score that there is not is None."""
        return {
            "sentence": self.sentence,
            "confidence": self.confidence,
            "word_confidences": list(self.word_confidences),
            "rescored": self.rescored,
            "problem": self.problem,
            "nbest": [
                {
                    "sentence": one.sentence,
                    "acoustic": one.hypothesis.acoustic,
                    "ngram": one.hypothesis.ngram,
                    "bonus": one.hypothesis.bonus,
                    "llm": one.hypothesis.llm,
                    "total": one.total,
                }
                for one in self.candidates
            ],
        }


def complete(
    hypotheses: Sequence[Hypothesis],
    settings: Settings,
    scorer: SentenceScorer | None = None,
    context: str = "",
) -> Answer:
    """The answer to a sentence: augments, rescores (with a scorer, unless `do_opt` is 0), ranks.

    A scorer that fails gives the n-gram answer with `rescored` False and the `problem`; it never
    raises.
    """
    candidates = augmented(hypotheses, settings)
    sentences = sentences_to_score(candidates, settings)
    if scorer is None or not sentences:
        return ranked_answer(candidates, settings)
    try:
        scores = checked_scores(scorer, sentences, context, settings.length_penalty)
    except RescoringError as error:
        return ranked_answer(candidates, settings, problem=str(error))
    return ranked_answer(candidates, settings, scores)


def augmented(hypotheses: Sequence[Hypothesis], settings: Settings) -> tuple[Hypothesis, ...]:
    """The candidates and those made from them, distinct, best first by the search's scores."""
    return augment(
        hypotheses,
        settings.acoustic_scale,
        settings.top_candidates_to_augment,
        settings.score_penalty_percent,
    )


def sentences_to_score(candidates: Sequence[Hypothesis], settings: Settings) -> list[str]:
    """The sentences that a large language model is asked about; none with `do_opt` 0."""
    return [one.sentence for one in candidates if one.words] if settings.do_opt else []


def checked_scores(
    scorer: SentenceScorer, sentences: Sequence[str], context: str, length_penalty: float
) -> dict[str, float]:
    """Sentence -> log-probability (ln).

    Raises:
      RescoringError: the scorer failed in whatever way, or a score is missing or not finite.
    """
    try:
        scores = np.asarray(scorer.score(sentences, context, length_penalty), np.float64)
    except RescoringError:
        raise
    # A model's library may fail with anything; the sentence must still get its n-gram answer.
    except Exception as error:
        _LOG.exception("rescoring with %s failed", scorer.name)
        raise RescoringError(
            f"{scorer.name} failed ({type(error).__name__}: {error}): see the server's log"
        ) from error
    if scores.shape != (len(sentences),):
        raise RescoringError(
            f"{scorer.name} gave scores of shape {scores.shape}; needed one for each of the "
            f"{len(sentences)} sentences: use another model"
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise RescoringError(
            f"{scorer.name} gave {len(bad)} of {len(sentences)} sentences no finite score, first "
            f"{scores[bad[0]]} for {sentences[bad[0]]!r}: load it in float32 or use another model"
        )
    return dict(zip(sentences, scores.tolist(), strict=True))


def ranked_answer(
    candidates: Sequence[Hypothesis],
    settings: Settings,
    scores: Mapping[str, float] | None = None,
    problem: str | None = None,
) -> Answer:
    """Ranks the candidates by their totals (ln) and says how sure that is.

    With scores, the total is acoustic_scale * acoustic + (1 - alpha) * ngram + alpha * llm + bonus;
    a candidate without words, which has no such score, is left out. Without, it is
    acoustic_scale * acoustic + ngram + bonus.
    """
    scale, alpha = settings.acoustic_scale, settings.alpha
    if scores is None:
        ranked = [Ranked(one, one.total(scale)) for one in rank(candidates, scale, len(candidates))]
    else:
        ranked = []
        for one in candidates:
            if one.words:
                llm = scores[one.sentence]
                language = (1.0 - alpha) * one.ngram + alpha * llm
                total = scale * one.acoustic + language + one.bonus
                ranked.append(Ranked(dataclasses.replace(one, llm=llm), total))
        # As `rank` breaks ties.
        ranked.sort(key=lambda one: (-round(one.total, 6), one.hypothesis.words))
    shares = posterior([one.total for one in ranked], settings.confidence_temperature)
    return Answer(
        tuple(ranked),
        float(shares[0]) if ranked else None,
        word_confidences([one.hypothesis.words for one in ranked], shares),
        scores is not None,
        problem,
    )


def posterior(totals: Sequence[float], temperature: float) -> np.ndarray:
    """Probability of each candidate, given that one is right: softmax(totals / temperature).

    The totals are log-probabilities of a model that believes its frames and words independent, and
    so is too sure of itself; a temperature above 1, which `lm-server tune` finds, makes up for it.
    """
    scaled = np.asarray(totals, np.float64) / temperature
    if not len(scaled):
        return scaled
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def word_confidences(candidates: Sequence[Sequence[str]], shares: np.ndarray) -> tuple[float, ...]:
    """For each word of the first candidate: the summed shares of the candidates that have it there.

    Each candidate is aligned to the first with the fewest word edits; it agrees on the words that
    these leave alone.
    """
    if not len(candidates):
        return ()
    best = list(candidates[0])
    mass = np.zeros(len(best))
    for words, share in zip(candidates, shares, strict=True):
        if share > _NEGLIGIBLE:
            for step in Levenshtein.opcodes(best, list(words)):
                if step.tag == "equal":
                    mass[step.src_start : step.src_end] += share
    # The sum of many shares may pass 1 by rounding.
    return tuple(np.minimum(mass, 1.0).tolist())
