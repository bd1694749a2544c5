"""From the search's candidates to a ranked answer with confidences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from lm_server.hypothesis import Answer, Hypothesis, in_order, rank
from lm_server.lexicon.text_rules import scored_words
from lm_server.rescoring.augment import augment
from lm_server.rescoring.risk import expected_errors
from lm_server.search.sliced import Sliced, finished
from lm_server.settings import Settings

_SLICE_CELLS = 4_000_000
"""Cells of alignments, which grow with the square of the length, between two yields: some 3 ms."""
_COMPARED = 100
"""Likeliest candidates of which each is compared with each for `minimum_bayes_risk`."""
_NEGLIGIBLE = 1e-9
"""Probability below which a candidate's words are not compared."""


def augmented(hypotheses: Sequence[Hypothesis], settings: Settings) -> tuple[Hypothesis, ...]:
    """Return the candidates and those made from them, distinct, best first by search scores."""
    return finished(augmenting(hypotheses, settings))


def augmenting(
    hypotheses: Sequence[Hypothesis], settings: Settings
) -> Sliced[tuple[Hypothesis, ...]]:
    """Do as `augmented` does, in slices."""
    return augment(
        hypotheses,
        settings.acoustic_scale,
        settings.top_candidates_to_augment,
        settings.score_penalty_percent,
    )


def sentences_to_score(candidates: Sequence[Hypothesis], settings: Settings) -> list[str]:
    """Return the sentences that a large language model scores. None of them with `do_opt` 0."""
    return [one.sentence for one in candidates if one.words] if settings.do_opt else []


def ngram_answer(hypotheses: Sequence[Hypothesis], settings: Settings) -> Answer:
    """Return the answer without a large language model: augmented and ranked."""
    return ranked_answer(augmented(hypotheses, settings), settings)


def ranked_answer(
    candidates: Sequence[Hypothesis],
    settings: Settings,
    scores: Mapping[str, float] | None = None,
    problem: str | None = None,
) -> Answer:
    """Rank the candidates by their totals (ln) and compute the confidences.

    With scores, the total is acoustic_scale * acoustic + (1 - alpha) * ngram + alpha * llm + bonus.
    A candidate without words has no such score and is left out. Without scores, the total is
    acoustic_scale * acoustic + ngram + bonus. With `minimum_bayes_risk` the likeliest candidates
    are in the order of the word errors to expect of them, and keep their totals.
    """
    return finished(ranking(candidates, settings, scores, problem))


def ranking(
    candidates: Sequence[Hypothesis],
    settings: Settings,
    scores: Mapping[str, float] | None = None,
    problem: str | None = None,
) -> Sliced[Answer]:
    """Do as `ranked_answer` does, in slices."""
    scale, alpha = settings.acoustic_scale, settings.alpha
    ranked: Sequence[Hypothesis]
    if scores is None:
        ranked = rank(candidates, scale, len(candidates))
    else:
        mixed = []
        for one in candidates:
            if one.words:
                llm = scores[one.sentence]
                language = (1.0 - alpha) * one.ngram + alpha * llm
                total = scale * one.acoustic + language + one.bonus
                mixed.append(dataclasses.replace(one, llm=llm, total=total))
        ranked = in_order(mixed)
    totals = [one.total for one in ranked if one.total is not None]
    shares = posterior(totals, settings.confidence_temperature)
    if settings.minimum_bayes_risk and ranked:
        yield
        order = _by_risk(ranked, shares)
        ranked, shares = [ranked[index] for index in order], shares[order]
    confidences = yield from word_confidences([one.words for one in ranked], shares)
    return Answer(
        tuple(ranked),
        float(shares[0]) if ranked else None,
        confidences,
        scores is not None,
        problem,
        settings.confidence_temperature,
    )


def _by_risk(ranked: Sequence[Hypothesis], shares: np.ndarray) -> list[int]:
    """Return the order by the word errors to expect, of the likeliest. The others stay behind."""
    likeliest = ranked[:_COMPARED]
    words = [scored_words(one.sentence) for one in likeliest]
    risks = expected_errors(words, shares[:_COMPARED])
    # Equals stay in the order of their totals.
    return [*sorted(range(len(likeliest)), key=risks.__getitem__), *range(_COMPARED, len(ranked))]


def posterior(totals: Sequence[float], temperature: float) -> np.ndarray:
    """Return the probability of each candidate, given that one is right.

    It is softmax(totals / temperature). The totals are log-probabilities of a model that takes
    its frames and words for independent, so it is overconfident. A temperature above 1, which
    `lm-server tune` finds, corrects that.
    """
    scaled = np.asarray(totals, np.float64) / temperature
    if not len(scaled):
        return scaled
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def word_confidences(
    candidates: Sequence[Sequence[str]], shares: np.ndarray
) -> Sliced[tuple[float, ...]]:
    """Return, for each word of the first candidate, the summed shares of those that have it there.

    Each candidate is aligned to the first with the fewest word edits. It agrees on the words that
    the edits leave alone.
    """
    if not len(candidates):
        return ()
    best = list(candidates[0])
    mass, compared = np.zeros(len(best)), 0
    for words, share in zip(candidates, shares, strict=True):
        if share > _NEGLIGIBLE:
            for step in Levenshtein.opcodes(best, list(words)):
                if step.tag == "equal":
                    mass[step.src_start : step.src_end] += share
            compared += len(best) * len(words)
            if compared > _SLICE_CELLS:
                compared = 0
                yield
    # The sum of many shares may pass 1 by rounding.
    return tuple(np.minimum(mass, 1.0).tolist())
