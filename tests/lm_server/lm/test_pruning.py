"""Entropy pruning removes what costs least, and leaves a distribution of the right size."""

import math

import numpy as np
import pytest
from test_kneser_ney import MEGABYTE, as_dictionary, encode, zipf_text

from lm_server.lm.estimate.kneser_ney import estimate
from lm_server.lm.estimate.pruning import prune, score
from lm_server.lm.sorted_ngrams import BEGIN, END, contexts_of


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    sentences = zipf_text(2, 800, 30)
    tokens, words = encode(sentences)
    folder = tmp_path_factory.mktemp("estimated")
    return sentences, estimate(tokens, words, 3, 64 * MEGABYTE, folder)


def backing_off(model, history, word):
    gram = (*history, word)
    if gram in model:
        return model[gram][0]
    return model.get(history, (0, 1.0))[1] * backing_off(model, history[1:], word)


def cross_entropy(model, sentences):
    """ln per word of a text."""
    total = words = 0
    for sentence in sentences:
        line = (BEGIN, *sentence, END)
        for end in range(1, len(line)):
            total -= math.log(backing_off(model, line[max(0, end - 2) : end], line[end]))
            words += 1
    return total / words


@pytest.mark.parametrize("most", [0, 1, 50, 400, 10**6])
def test_the_largest_model_that_fits_is_kept(estimated, most):
    _, result = estimated
    scored = score(result.model, result.followed)
    pruned = prune(scored, lambda counts: sum(counts[1:]) <= most)
    kept = sum(pruned.counts[1:])
    assert kept <= most
    assert pruned.counts[0] == result.model.counts[0]
    # No more than the parts of one n-gram are missing to the allowed number.
    assert kept >= min(most, sum(result.model.counts[1:])) - 3
    assert all(pruned.counts)


@pytest.mark.parametrize("most", [50, 400])
def test_a_pruned_model_is_a_distribution_and_complete(estimated, most):
    _, result = estimated
    pruned = prune(score(result.model, result.followed), lambda c: sum(c[1:]) <= most)
    model = as_dictionary(pruned)
    for gram in model:
        assert gram[1:] in model or len(gram) == 1
        assert gram[:-1] in model or len(gram) == 1
    words = [word for word in pruned.words if word != BEGIN]
    for history in [(), (BEGIN,), ("w1",), ("w1", "w1"), (BEGIN, "w1"), ("w2", "w9")]:
        total = math.fsum(backing_off(model, history, word) for word in words)
        assert total == pytest.approx(1.0, abs=1e-4), history
    for level, order in enumerate(pruned.orders[1:], 2):
        assert (np.diff(order.parent) >= 0).all()
        if level == 2:
            assert (contexts_of(pruned, 2, None) >= 0).all()


def test_costs_are_what_the_text_s_entropy_rises_by(estimated):
    # Leave out single trigrams by brute force and compare with what the formula says.
    _, result = estimated
    scored = score(result.model, result.followed)
    whole = as_dictionary(result.model)
    tokens = result.followed[0].sum()
    order = result.model.orders[2]
    context = scored.contexts[1]
    rng = np.random.default_rng(0)
    for row in rng.choice(len(order), 12, replace=False):
        same = np.flatnonzero(context == context[row])
        names = list(whole)[sum(result.model.counts[:2]) :]
        grams = [names[i] for i in same]
        left = [gram for gram in grams if gram != names[row]]
        p = sum(whole[gram][0] for gram in left)
        below = sum(whole[gram[1:]][0] for gram in left)
        less = dict(whole)
        del less[names[row]]
        history = names[row][:-1]
        less[history] = (whole[history][0], (1 - p) / (1 - below))
        divergence = sum(
            backing_off(whole, history, word)
            * math.log(backing_off(whole, history, word) / backing_off(less, history, word))
            for word in result.model.words
            if word != BEGIN
        )
        share = result.followed[1][context[row]] / tokens
        assert scored.costs[2][row] == pytest.approx(share * divergence, rel=1e-3, abs=1e-9)


def test_pruning_by_entropy_hurts_less_than_cutting_at_random(estimated):
    sentences, result = estimated
    whole = cross_entropy(as_dictionary(result.model), sentences[:200])
    scored = score(result.model, result.followed)
    most = sum(result.model.counts[1:]) // 3
    good = as_dictionary(prune(scored, lambda c: sum(c[1:]) <= most))
    rng = np.random.default_rng(1)
    blind = type(scored)(
        scored.model,
        scored.contexts,
        [scored.costs[0], *(rng.permutation(cost) for cost in scored.costs[1:])],
    )
    # A random choice is made complete as the real one is.
    for level in (3,):
        np.maximum.at(blind.costs[level - 2], blind.contexts[level - 2], blind.costs[level - 1])
        parents = result.model.orders[level - 1].parent
        np.maximum.at(blind.costs[level - 2], parents, blind.costs[level - 1])
    bad = as_dictionary(prune(blind, lambda c: sum(c[1:]) <= most))
    lost = cross_entropy(good, sentences[:200]) - whole
    assert lost < 0.5 * (cross_entropy(bad, sentences[:200]) - whole)


def test_how_often_histories_are_followed_is_counted(estimated):
    sentences, result = estimated
    names = list(as_dictionary(result.model))
    followed = dict(zip(names, np.concatenate(result.followed).tolist(), strict=False))
    assert followed[(BEGIN,)] == len(sentences)
    assert followed[("w1",)] == sum(sentence.count("w1") for sentence in sentences)
    assert followed[(END,)] == 0
    starts = sum(sentence[0] == "w1" for sentence in sentences)
    assert followed[(BEGIN, "w1")] == starts
