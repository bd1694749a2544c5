"""The estimator must give, n-gram by n-gram, what the definition of modified Kneser-Ney gives."""

import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_server.lm.estimate import kneser_ney, ngram_counts
from lm_server.lm.estimate.kneser_ney import EstimationError, check_prune, estimate
from lm_server.lm.sorted_ngrams import BEGIN, END, UNKNOWN, in_order_of_ids

MEGABYTE = 1 << 20


def zipf_text(seed: int, sentences: int, words: int = 40) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [
        [f"w{min(int(z), words - 1)}" for z in rng.zipf(1.4, rng.integers(1, 9))]
        for _ in range(sentences)
    ]


def encode(sentences, outside=()):
    """(tokens, words by id); words in `outside` get the id 0."""
    vocabulary = {word for sentence in sentences for word in sentence} - set(outside)
    words = in_order_of_ids([UNKNOWN, BEGIN, END, *sorted(vocabulary)])
    ids = {word: number for number, word in enumerate(words)}
    tokens = [ids.get(w, 0) for sentence in sentences for w in [BEGIN, *sentence, END]]
    return np.array(tokens, np.int32), words


def as_dictionary(model):
    """n-gram -> (probability, back-off weight), read along the parents."""
    found, rows = {}, [[(word,) for word in model.words]]
    for order in model.orders[1:]:
        below = rows[-1]
        rows.append(
            [
                (model.words[word], *below[parent])
                for word, parent in zip(order.word, order.parent, strict=True)
            ]
        )
    for grams, order in zip(rows, model.orders, strict=True):
        assert len(set(grams)) == len(grams)
        for gram, log10, backoff in zip(grams, order.log10, order.backoff, strict=True):
            found[gram] = (10.0 ** float(log10), 10.0 ** float(backoff))
    return found


def by_definition(sentences, order, prune, outside=()):
    """Modified Kneser-Ney in dictionaries, from its definition; independent of the estimator."""
    raw = [Counter() for _ in range(order + 1)]
    for sentence in sentences:
        line = [BEGIN, *(UNKNOWN if w in outside else w for w in sentence), END]
        for end in range(1, len(line)):
            for n in range(1, order + 1):
                if end - n + 1 >= 0:
                    raw[n][tuple(line[end - n + 1 : end + 1])] += 1
    adjusted = [Counter() for _ in range(order + 1)]
    adjusted[order] = raw[order]
    for n in range(1, order):
        for gram in raw[n + 1]:
            adjusted[n][gram[1:]] += 1
        for gram, count in raw[n].items():
            if gram[0] == BEGIN:
                adjusted[n][gram] = count
    if order > 1:
        del raw[1][(BEGIN,)], adjusted[1][(BEGIN,)]
    del adjusted[1][(UNKNOWN,)]
    vocabulary = {gram[0] for gram in adjusted[1]} | {UNKNOWN}
    result, probability = {}, {}
    for n in range(1, order + 1):
        of = Counter(adjusted[n].values())
        try:
            y = of[1] / (of[1] + 2 * of[2])
            discount = [0.0] + [k - (k + 1) * y * of[k + 1] / of[k] for k in (1, 2, 3)]
            assert all(0 <= discount[k] <= k for k in (1, 2, 3))
        except (ZeroDivisionError, AssertionError):
            discount = [0.0, 0.5, 1.0, 1.5]
        total, gamma = Counter(), Counter()
        kept = []
        for gram, count in adjusted[n].items():
            total[gram[:-1]] += count
            if n == 1 or (raw[n][gram] > prune[n - 1] and UNKNOWN not in gram):
                kept.append(gram)
                gamma[gram[:-1]] += discount[min(count, 3)]
            else:
                gamma[gram[:-1]] += count
        for context in total:
            gamma[context] /= total[context]
            if context in result:
                result[context] = (result[context][0], gamma[context])
        if n == 1:
            kept.append((UNKNOWN,))
        for gram in kept:
            lower = probability[gram[1:]] if n > 1 else 1 / len(vocabulary)
            count = adjusted[n][gram]
            share = (count - discount[min(count, 3)]) / total[gram[:-1]] if count else 0.0
            probability[gram] = share + gamma[gram[:-1]] * lower
            result[gram] = (probability[gram], 1.0)
        if n == 1:
            result[(BEGIN,)] = (0.0, 1.0)
    return result


def check(sentences, order, prune, tmp_path, memory=64 * MEGABYTE, outside=()):
    tokens, words = encode(sentences, outside)
    got = as_dictionary(estimate(tokens, words, order, memory, tmp_path, prune).model)
    padded = list(prune) + [prune[-1]] * (order - len(prune))
    expected = by_definition(sentences, order, padded, outside)
    assert set(got) == set(expected)
    for gram, values in expected.items():
        assert got[gram] == pytest.approx(values, rel=2e-5, abs=1e-12), gram
    return got


@pytest.mark.parametrize(
    ("order", "prune"),
    [(1, [0]), (2, [0]), (3, [0]), (3, [0, 0, 1]), (4, [0, 1]), (5, [0]), (5, [0, 0, 1, 1, 2])],
)
def test_every_ngram_has_the_values_of_the_definition(tmp_path, order, prune):
    check(zipf_text(order, 300), order, prune, tmp_path)


@given(
    st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=6), min_size=1, max_size=12),
    st.integers(1, 5),
    st.sampled_from([[0], [0, 1], [0, 0, 1, 2]]),
)
@settings(max_examples=60)
def test_small_texts_have_the_values_of_the_definition(tmp_path_factory, sentences, order, prune):
    check(sentences, order, prune[:order], tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("order", [2, 5])
def test_words_outside_the_vocabulary_leave_a_distribution_over_the_others(tmp_path, order):
    sentences = zipf_text(8, 200)
    model = check(sentences, order, [0], tmp_path, outside={"w1", "w7"})
    assert not any(UNKNOWN in gram for gram in model if len(gram) > 1)


def test_runs_on_disk_give_the_same_bytes_as_memory(tmp_path, monkeypatch):
    sentences = zipf_text(3, 4000, 400)
    tokens, words = encode(sentences)
    # Chunks and blocks so small that every group is cut somewhere, and dozens of runs are merged.
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = estimate(tokens, words, 4, 512 * MEGABYTE, tmp_path / "whole", [0, 0, 1])
    monkeypatch.setattr(kneser_ney, "_SMALLEST_MEMORY", 1 << 16)
    monkeypatch.setattr(kneser_ney, "_ROWS", 1000)
    monkeypatch.setattr(ngram_counts, "_TOKENS_PER_CHUNK", 777)
    cut = estimate(tokens, words, 4, 1 << 16, tmp_path / "cut", [0, 0, 1])
    assert whole.discounts == cut.discounts
    for one, other in zip(whole.model.orders, cut.model.orders, strict=True):
        for name in ("word", "parent", "log10", "backoff"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_long_keys_of_large_vocabularies_are_handled(tmp_path, monkeypatch):
    # As if there were two million words: three words in a number, then one in a third column.
    monkeypatch.setattr(ngram_counts.Packing, "bits", property(lambda self: 27))
    check(zipf_text(4, 150), 5, [0], tmp_path)


@pytest.mark.parametrize("prune", [[0], [0, 0, 1], [0, 2]])
def test_what_is_estimated_is_a_distribution_after_every_history(tmp_path, prune):
    sentences = zipf_text(1, 500, 25)
    tokens, words = encode(sentences)
    model = as_dictionary(estimate(tokens, words, 3, 64 * MEGABYTE, tmp_path, prune).model)

    def probability(history, word):
        gram = (*history, word)
        if gram in model:
            return model[gram][0]
        return model.get(history, (0, 1.0))[1] * probability(history[1:], word)

    histories = [(BEGIN,), (), ("w1",), ("w3", "w1"), (BEGIN, "w2"), ("w24", "w24")]
    for history in histories:
        total = math.fsum(probability(history, word) for word in words if word != BEGIN)
        assert total == pytest.approx(1.0, abs=1e-5), history


def test_too_regular_a_text_uses_fallback_discounts_and_says_so(tmp_path):
    tokens, words = encode([["a", "b", "c"]])
    result = estimate(tokens, words, 2, MEGABYTE, tmp_path)
    assert result.fallbacks == [1, 2]
    assert result.discounts[1] == kneser_ney.FALLBACK


@pytest.mark.parametrize("prune", [[1], [0, 2, 1], [0, 0, 0, 0]])
def test_cut_offs_that_cannot_be_followed_are_refused(prune):
    with pytest.raises(EstimationError, match=re.escape("needed at most one per order")):
        check_prune(prune, 3)


def test_the_last_cut_off_holds_for_higher_orders():
    assert check_prune([0, 0, 1], 5) == [0, 0, 1, 1, 1]


def test_progress_adds_up(tmp_path):
    seen, totals = defaultdict(int), {}
    tokens, words = encode(zipf_text(1, 100))

    def advance(stage, done, total):
        seen[stage] += done
        totals[stage] = total

    estimate(tokens, words, 3, MEGABYTE, tmp_path, advance=advance)
    assert seen == totals
