"""N-gram models are distributions, also over words that their text does not have."""

import math
from collections import Counter

import numpy as np
import pytest

from lm_server.ngram import (
    OUTSIDE,
    ModelError,
    count_unigrams,
    read_arpa,
    repair_zeros,
    spread_unseen,
    train_arpa,
    trainer_name,
    without_outside,
)

SENTENCES = ["the cat sat", "the dog sat", "a cat ran", "the cat ran", "a dog ran home"]


@pytest.fixture
def trained(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 3 + [f"the {OUTSIDE} sat", f"{OUTSIDE} ran"]) + "\n")
    train_arpa(text, tmp_path / "lm.arpa", 3)
    return read_arpa(tmp_path / "lm.arpa")


def unigrams(model):
    return {
        word: 10.0 ** float(model.orders[0].log10[row])
        for row, word in enumerate(model.words)
        if word != "<s>"
    }


def test_counted_unigrams_are_relative_frequencies():
    model = count_unigrams([["a", "b", "a"], ["a", OUTSIDE]])
    got = unigrams(model)
    # Three a, one b, two sentence ends; the word outside does not count.
    assert got.pop("<unk>") < 1e-90
    assert got == pytest.approx({"a": 3 / 6, "b": 1 / 6, "</s>": 2 / 6})


def test_no_text_is_an_error():
    with pytest.raises(ModelError, match="no sentence"):
        count_unigrams([])


def test_ngrams_with_words_outside_are_gone_and_the_others_unchanged(trained):
    model = without_outside(trained)
    assert OUTSIDE not in model.words
    before = {
        tuple(trained.words[w] for w in row): (p, b)
        for grams in trained.orders
        for row, p, b in zip(grams.words, grams.log10, grams.backoff, strict=True)
    }
    after = {
        tuple(model.words[w] for w in row): (p, b)
        for grams in model.orders
        for row, p, b in zip(grams.words, grams.log10, grams.backoff, strict=True)
    }
    assert after == {words: values for words, values in before.items() if OUTSIDE not in words}
    assert len(after) < len(before)


def test_ngrams_without_probability_get_what_backing_off_gives(trained):
    model = without_outside(trained)
    zeros = model.orders[2].log10 < -90
    spoiled = model.orders[2].log10.copy()
    zeros[0], spoiled[0] = True, -99.0
    model.orders[2].log10[:] = spoiled
    repaired = repair_zeros(model).orders
    find = {tuple(row): i for i, row in enumerate(repaired[1].words.tolist())}
    for row in np.flatnonzero(zeros):
        a, b, c = repaired[2].words[row].tolist()
        expected = repaired[1].log10[find[b, c]] + repaired[1].backoff[find[a, b]]
        assert repaired[2].log10[row] == pytest.approx(expected)
    np.testing.assert_array_equal(repaired[2].log10[~zeros], spoiled[~zeros])
    assert min(grams.log10.min() for grams in repaired[1:]) > -90


@pytest.mark.parametrize("unseen", [0, 1, 1000, 100_000])
def test_seen_and_unseen_words_together_have_probability_one(trained, unseen):
    counts = Counter(word for sentence in SENTENCES for word in sentence.split())
    model = spread_unseen(without_outside(trained), counts, unseen)
    probabilities = unigrams(model)
    each = probabilities.pop("<unk>")
    assert sum(probabilities.values()) + unseen * each == pytest.approx(1.0, abs=1e-4)
    assert each <= min(probabilities.values()) * 1.001
    assert each > 0


def test_a_new_word_is_as_likely_as_words_seen_once_are_frequent():
    counts = Counter({"often": 98, "once": 1, "also": 1})
    model = count_unigrams([[word] * count for word, count in counts.items()])
    each = unigrams(spread_unseen(model, counts, 1000))["<unk>"]
    # Good and Turing: 2 of 101 events (with an end) were new; shared by a thousand words.
    assert each == pytest.approx(2 / 101 / 1000, rel=1e-5)


@pytest.mark.parametrize(
    ("arpa", "reason"),
    [
        ("no model at all\n", "no n-grams"),
        ("\\data\\\nngram 1=2\n\n\\1-grams:\n-1\ta\n\n\\end\\\n", "has 1 1-grams but announces 2"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\n-1\ta b c d\n\n\\end\\\n", "not ARPA"),
    ],
)
def test_a_file_that_is_no_arpa_is_refused(tmp_path, arpa, reason):
    (tmp_path / "lm.arpa").write_text(arpa)
    with pytest.raises(ModelError, match=reason):
        read_arpa(tmp_path / "lm.arpa")


def test_a_failing_trainer_is_named_with_what_it_said(tmp_path):
    with pytest.raises(ModelError, match=rf"{trainer_name(2)} could not train .* \(exit code"):
        train_arpa(tmp_path / "absent.txt", tmp_path / "lm.arpa", 2)


def test_a_trained_model_is_a_distribution_after_every_history(trained):
    # Written down anew: back-off probabilities of all words after each bigram history sum to 1.
    log10 = [{}, {}, {}]
    backoff = [{}, {}, {}]
    for level, grams in enumerate(trained.orders):
        for row, p, b in zip(grams.words.tolist(), grams.log10, grams.backoff, strict=True):
            words = tuple(trained.words[w] for w in row)
            log10[level][words], backoff[level][words] = float(p), float(b)

    def score(history, word):
        words = (*history, word)
        if words in log10[len(words) - 1]:
            return log10[len(words) - 1][words]
        return backoff[len(history) - 1].get(history, 0.0) + score(history[1:], word)

    vocabulary = [words[0] for words in log10[0] if words[0] != "<s>"]
    for history in [("the", "cat"), ("<s>", "the"), ("a", "dog"), ("ran",), ("cat", "the")]:
        total = math.fsum(10.0 ** score(history, word) for word in vocabulary)
        assert total == pytest.approx(1.0, abs=0.02), history
