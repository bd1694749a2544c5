"""Entropy pruning: removal of the n-grams that change the model's distribution least.

Source: A. Stolcke, "Entropy-based Pruning of Backoff Language Models" (1998). The probability of a
history is its share of the text, not the product of the model's lower orders, because the lower
orders of a Kneser-Ney model do not reflect word frequencies (C. Chelba et al., "Study on
Interaction between Entropy Pruning and Kneser-Ney Smoothing", 2010).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lm_server.lm.sorted_ngrams import (
    LEAST,
    SortedModel,
    SortedOrder,
    contexts_of,
    normalising_backoffs,
)


@dataclass(frozen=True)
class Scored:
    """A model with the cost of removing each n-gram.

    Attributes:
      contexts: per order from 2, the rows of the n-grams' contexts.
      costs: per order, relative entropy (ln) of the model without the n-gram, weighted by its
        history's frequency. At least the cost of every longer n-gram that needs it. Infinite for
        order 1, which is never pruned.
    """

    model: SortedModel
    contexts: Sequence[np.ndarray]
    costs: Sequence[np.ndarray]

    def counts(self, threshold: float) -> list[int]:
        """Return the number of n-grams per order whose cost is at least `threshold`."""
        return [int((cost >= threshold).sum()) for cost in self.costs]


def score(model: SortedModel, followed: Sequence[np.ndarray]) -> Scored:
    """Compute the cost of removing each n-gram.

    Args:
      model: a model with the suffix and the context of every n-gram.
      followed: per order but the highest, how often a word follows each n-gram in the text.
    """
    contexts: list[np.ndarray] = []
    costs = [np.full(len(model.orders[0]), np.inf)]
    total = max(float(followed[0].sum()), 1.0) if followed else 1.0
    for level in range(2, len(model.orders) + 1):
        contexts.append(contexts_of(model, level, contexts[-1] if contexts else None))
        frequency = followed[level - 2] / total
        costs.append(_costs(model, level, contexts[-1], frequency))
    # An n-gram is kept as long as a longer one needs it as its context or suffix.
    for level in range(len(model.orders), 2, -1):
        np.maximum.at(costs[level - 2], contexts[level - 2], costs[level - 1])
        np.maximum.at(costs[level - 2], model.orders[level - 1].parent, costs[level - 1])
    return Scored(model, contexts, costs)


def _costs(
    model: SortedModel, level: int, context: np.ndarray, frequency: np.ndarray
) -> np.ndarray:
    order, lower = model.orders[level - 1], model.orders[level - 2]
    log_p = np.asarray(order.log10, np.float64) * np.log(10.0)
    log_lower = np.asarray(lower.log10[order.parent], np.float64) * np.log(10.0)
    log_backoff = np.asarray(lower.backoff[context], np.float64) * np.log(10.0)
    p, below = np.exp(log_p), np.exp(log_lower)
    left = 1.0 - np.bincount(context, p, len(lower))[context]
    left_below = 1.0 - np.bincount(context, below, len(lower))[context]
    left, left_below = np.maximum(left, LEAST), np.maximum(left_below, LEAST)
    log_new = np.log(left + p) - np.log(left_below + below)
    change = p * (log_lower + log_new - log_p) + left * (log_new - log_backoff)
    cost: np.ndarray = -frequency[context] * change
    return cost


def prune(scored: Scored, fits: Callable[[Sequence[int]], bool]) -> SortedModel:
    """Keep the costliest n-grams, as many as `fits` accepts.

    `fits` receives the numbers of n-grams per order. The 1-grams are always kept.
    """
    if fits(scored.model.counts):
        return scored.model
    finite = [cost[np.isfinite(cost)] for cost in scored.costs[1:]]
    # Every cost is a candidate threshold. Bisect over them.
    steps = np.unique(np.concatenate([np.zeros(1), *finite]))
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        if fits(scored.counts(steps[middle])):
            high = middle
        else:
            low = middle + 1
    threshold = steps[low] if low < len(steps) else np.inf
    return _keep(scored, threshold)


def _keep(scored: Scored, threshold: float) -> SortedModel:
    model, orders = scored.model, []
    numbers: np.ndarray | None = None
    for level, cost in enumerate(scored.costs, 1):
        rows = np.flatnonzero(cost >= threshold)
        order = model.orders[level - 1].select(rows)
        if numbers is not None:
            order = SortedOrder(order.word, numbers[order.parent], order.log10, order.backoff)
        if level < len(model.orders):
            backoff = _backoffs(scored, level, threshold)[rows]
            order = SortedOrder(order.word, order.parent, order.log10, backoff)
        orders.append(order)
        numbers = np.cumsum(cost >= threshold) - 1
    while len(orders) > 1 and not len(orders[-1]):
        orders.pop()
        last = orders[-1]
        nothing = np.full(len(last), -0.0, np.float32)
        orders[-1] = SortedOrder(last.word, last.parent, last.log10, nothing)
    return SortedModel(model.words, orders)


def _backoffs(scored: Scored, level: int, threshold: float) -> np.ndarray:
    """Return the back-off weights of one order for the n-grams kept in the order above."""
    longer, order = scored.model.orders[level], scored.model.orders[level - 1]
    rows = np.flatnonzero(scored.costs[level] >= threshold)
    return normalising_backoffs(longer.select(rows), order, scored.contexts[level - 1][rows])
