"""Linear interpolation of n-gram models into one, and the weights that suit a text best.

Every n-gram that one of the models has gets the weighted mean of their probabilities, each model
backing off where it lacks it. Back-off weights are computed anew, so that the result is a
distribution. Source: A. Stolcke, "SRILM - An Extensible Language Modeling Toolkit" (2002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm_server.lm.sorted_ngrams import (
    UNKNOWN,
    SortedModel,
    SortedOrder,
    contexts_of,
    in_order_of_ids,
    mark_contexts,
    normalising_backoffs,
)

_NOTHING = -99.0
_ROUNDS = 200
_SETTLED = 1e-6


def interpolate(models: Sequence[SortedModel], weights: Sequence[float]) -> SortedModel:
    """Return one model: the weighted mean of the probabilities of all.

    A word that a model lacks has the probability of its `<unk>` there, as in the search.

    Args:
      models: with the suffix and the context of every n-gram.
      weights: one per model, which sum to 1.
    """
    words = in_order_of_ids(list(dict.fromkeys(word for one in models for word in one.words)))
    number = {word: index for index, word in enumerate(words)}
    ids = [np.array([number[word] for word in one.words], np.int64) for one in models]
    log10, backoffs, orders = [], [], []
    # Words and, level by level, n-grams keep their order in the union: it is sorted alike.
    rows = ids
    for one, own in zip(models, ids, strict=True):
        unigrams = one.orders[0]
        values = np.full(len(words), unigrams.log10[one.words.index(UNKNOWN)], np.float64)
        values[own] = unigrams.log10
        log10.append(values)
        backoffs.append(_at(own, unigrams.backoff, len(words)))
    every = np.arange(len(words))
    orders.append(_order(every, np.zeros(len(words), np.int64), log10, weights))
    context: np.ndarray | None = None
    for level in range(2, max(len(one.orders) for one in models) + 1):
        has = [len(one.orders) >= level for one in models]
        keys = [
            rows[i][one.orders[level - 1].parent] * len(words) + ids[i][one.orders[level - 1].word]
            if has[i]
            else np.zeros(0, np.int64)
            for i, one in enumerate(models)
        ]
        # Of sorted parts, which a stable sort merges. `np.unique` would take several times as long.
        key = np.sort(np.concatenate(keys), kind="stable")
        key = key[np.diff(key, prepend=-1) > 0]
        parent, word = np.divmod(key, len(words))
        rows = [np.searchsorted(key, own) for own in keys]
        partial = SortedModel(words, [*orders, SortedOrder(word, parent, word, word)])
        context = contexts_of(partial, level, context)
        for i, one in enumerate(models):
            log10[i] = backoffs[i][context] + log10[i][parent]
            if has[i]:
                log10[i][rows[i]] = one.orders[level - 1].log10
            own_backoff = one.orders[level - 1].backoff if has[i] else np.zeros(0)
            backoffs[i] = _at(rows[i], own_backoff, len(key))
        orders.append(_order(word, parent, log10, weights))
        lower = orders[-2]
        weight = normalising_backoffs(orders[-1], lower, context)
        orders[-2] = SortedOrder(lower.word, lower.parent, lower.log10, weight)
    return mark_contexts(SortedModel(words, orders))


def _at(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Return float64 [count] with `values` at `rows`, else 0."""
    found = np.zeros(count)
    found[rows] = values
    return found


def _order(
    word: np.ndarray, parent: np.ndarray, log10: Sequence[np.ndarray], weights: Sequence[float]
) -> SortedOrder:
    p = sum(weight * 10.0**one for weight, one in zip(weights, log10, strict=True))
    with np.errstate(divide="ignore"):
        mean = np.maximum(np.log10(p), _NOTHING).astype(np.float32)
    return SortedOrder(word.astype(np.uint32), parent, mean, np.zeros(len(word), np.float32))


def best_weights(log10: np.ndarray) -> np.ndarray:
    """Return the weights with the least perplexity on a text, by expectation maximisation.

    Args:
      log10: [words, models], the base-10 logarithm of each word's probability under each model.
    """
    p = 10.0 ** np.asarray(log10, np.float64)
    weights = np.full(p.shape[1], 1.0 / p.shape[1])
    for _ in range(_ROUNDS):
        shares = weights * p
        before, weights = weights, (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
        if np.abs(weights - before).max() < _SETTLED:
            break
    return weights
