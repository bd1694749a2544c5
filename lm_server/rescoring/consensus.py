"""One sentence of several systems' n-best lists: minimum Bayes risk, and ROVER.

Words are compared as they are scored (`lm_server.lexicon.text_rules`), so that capitals and
punctuation of one system are no differences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_server.files.answers_file import scored_nbest, unscored
from lm_server.lexicon.text_rules import scored_words
from lm_server.rescoring.ranking import posterior, word_confidences
from lm_server.rescoring.risk import expected_errors
from lm_server.search.sliced import finished

METHODS = ("mbr", "rover")
Scored = tuple[str, float | None]
"""A sentence and its total (ln). None: the system has no scores."""


@dataclass(frozen=True)
class Candidate:
    """A sentence with its share of all systems' probability and the word errors to expect of it."""

    sentence: str
    share: float
    expected_errors: float


@dataclass(frozen=True)
class Consensus:
    """Candidates, the chosen one first, and the confidence of each of its scored words."""

    candidates: tuple[Candidate, ...]
    word_confidences: tuple[float, ...]


def together(answers: Sequence[Mapping[str, Any]], method: str = METHODS[0]) -> dict[str, Any]:
    """Return one answer to a trial out of several systems' answers. A single one is returned as is.

    Its totals are the negative word errors to expect.

    Args:
      answers: lines of `lm-server decode` about one trial, one or more.
      method: one of `METHODS`.
    """
    found = None
    if len(answers) > 1:
        found = agree([scored_nbest(one) for one in answers], method)
    if found is None:
        return dict(answers[0])
    best = found.candidates[0]
    return {
        "trial": answers[0]["trial"],
        "sentence": best.sentence,
        "confidence": best.share,
        "word_confidences": list(found.word_confidences),
        "rescored": all(one.get("rescored") for one in answers),
        "problem": None,
        "temperature": None,
        "nbest": [unscored(one.sentence, -one.expected_errors) for one in found.candidates],
    }


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


def shares(
    systems: Sequence[Sequence[Scored]], temperature: float = 1.0, nbest: int = 100
) -> dict[tuple[str, ...], tuple[str, float]]:
    """Return for each distinct sequence of words a sentence and its share of the probability.

    Each system has an equal part, which its hypotheses share by softmax(totals / temperature). A
    list without scores shares it evenly.

    Raises:
      ValueError: no system has a hypothesis.
    """
    lists = [list(one)[:nbest] for one in systems if one]
    if not lists:
        raise ValueError("found no hypothesis in any system; needed one or more")
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for hypotheses in lists:
        totals = [0.0 if total is None else total for _, total in hypotheses]
        for (sentence, _), share in zip(hypotheses, posterior(totals, temperature), strict=True):
            texts = found.setdefault(scored_words(sentence), {})
            texts[sentence] = texts.get(sentence, 0.0) + float(share) / len(lists)
    return {
        words: (max(texts, key=lambda text: (texts[text], text)), sum(texts.values()))
        for words, texts in found.items()
    }


def minimum_bayes_risk(
    systems: Sequence[Sequence[Scored]], temperature: float = 1.0, nbest: int = 100
) -> Consensus:
    """Rank all hypotheses by the word errors to expect, if each is the truth as often as its share.

    >>> found = minimum_bayes_risk([[("a b", None)], [("a c", None)], [("d b", None)]])
    >>> found.candidates[0].sentence
    'a b'

    Args:
      systems: each one's hypotheses, best first. An empty list has no part.
      temperature: of the totals. Above 1 trusts a system's first hypotheses less.
      nbest: hypotheses of each that are compared.

    Raises:
      ValueError: no system has a hypothesis.
    """
    by_words = shares(systems, temperature, nbest)
    risks = expected_errors([*by_words], [share for _, share in by_words.values()])
    # Equals by share, then by the words.
    ranked = sorted(
        zip(by_words, risks, strict=True),
        key=lambda one: (one[1], -by_words[one[0]][1], one[0]),
    )
    confidences = finished(
        word_confidences(
            [words for words, _ in ranked], np.array([by_words[words][1] for words, _ in ranked])
        )
    )
    return Consensus(
        tuple(Candidate(*by_words[words], risk) for words, risk in ranked), confidences
    )


@dataclass
class _Slot:
    """Words that stand in one place of a network, "" for none, with their votes."""

    votes: Counter[str]


def rover(systems: Sequence[Sequence[Scored]], weights: Sequence[float] | None = None) -> Consensus:
    """Align each system's first sentence to a network of words, one after another, and vote.

    A tie goes to the system that is given first.

    >>> rover([[("a b c", None)], [("a x c", None)], [("a b", None)]]).candidates[0].sentence
    'a b c'

    Args:
      systems: each one's hypotheses, of which the first counts.
      weights: votes of each. None: one each.

    Raises:
      ValueError: no system has a hypothesis.
    """
    given = [1.0] * len(systems) if weights is None else list(weights)
    voters = [
        (scored_words(found[0][0]), weight)
        for found, weight in zip(systems, given, strict=True)
        if found
    ]
    if not voters:
        raise ValueError("found no hypothesis in any system; needed one or more")
    network: list[_Slot] = []
    before = 0.0
    for words, weight in voters:
        network = _joined(network, words, weight, before)
        before += weight
    # `max` takes the first of equals, and a Counter keeps the order in which votes came.
    chosen = [max(slot.votes, key=lambda word: slot.votes[word]) for slot in network]
    kept = [(word, slot.votes[word] / before) for word, slot in zip(chosen, network, strict=True)]
    words_kept = [(word, share) for word, share in kept if word]
    sentence = " ".join(word for word, _ in words_kept)
    share = math.prod(share for _, share in kept)
    wrong = sum(1 - share for _, share in kept)
    return Consensus((Candidate(sentence, share, wrong),), tuple(share for _, share in words_kept))


def _joined(
    network: Sequence[_Slot], words: Sequence[str], weight: float, before: float
) -> list[_Slot]:
    """Align words to a network by the fewest edits, where a slot fits any word that it holds."""
    rows, columns = len(network) + 1, len(words) + 1
    cost = np.zeros((rows, columns))
    cost[:, 0], cost[0] = np.arange(rows), np.arange(columns)
    for row in range(1, rows):
        # A slot that was empty for somebody may be passed over.
        skip = 0.0 if "" in network[row - 1].votes else 1.0
        cost[row, 0] = cost[row - 1, 0] + skip
        for column in range(1, columns):
            wrong = words[column - 1] not in network[row - 1].votes
            cost[row, column] = min(
                cost[row - 1, column - 1] + wrong,
                cost[row - 1, column] + skip,
                cost[row, column - 1] + 1,
            )
    found: list[_Slot] = []
    row, column = rows - 1, columns - 1
    while row or column:
        slot = network[row - 1] if row else None
        if slot and column:
            wrong = words[column - 1] not in slot.votes
            if cost[row, column] == cost[row - 1, column - 1] + wrong:
                found.append(_voted(slot, words[column - 1], weight))
                row, column = row - 1, column - 1
                continue
        skip = 1.0 if slot and "" not in slot.votes else 0.0
        if slot and cost[row, column] == cost[row - 1, column] + skip:
            found.append(_voted(slot, "", weight))
            row -= 1
        else:
            empty = Counter({"": before}) if before else Counter()
            found.append(_voted(_Slot(empty), words[column - 1], weight))
            column -= 1
    return found[::-1]


def _voted(slot: _Slot, word: str, weight: float) -> _Slot:
    votes = slot.votes.copy()
    votes[word] += weight  # type: ignore[assignment]
    return _Slot(votes)
