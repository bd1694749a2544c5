"""Claims about augmentation: the published exchange of words, checked against a plain version."""

from __future__ import annotations

import dataclasses
import time
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_server.hypothesis import Hypothesis
from lm_server.rescoring.augment import augment
from lm_server.search.sliced import finished

SCALE = 0.325


def augmented(*arguments: Any) -> tuple[Hypothesis, ...]:
    return finished(augment(*arguments))


def hypothesis(sentence: str, acoustic: float, ngram: float, bonus: float = 0.0) -> Hypothesis:
    return Hypothesis(tuple(sentence.split()), acoustic, ngram, bonus=bonus)


def edit(source: tuple[str, ...], target: tuple[str, ...]) -> list[str]:
    """For each word of `source`: kept, removed or replaced, by recursion from the end; what is put
    in between shows nowhere. Ties: keep, put in, remove, replace."""

    @lru_cache(None)
    def walk(i: int, j: int) -> tuple[int, tuple[str, ...]]:
        if i == 0:
            return j, ()
        if j == 0:
            return i, ("removed",) * i
        if source[i - 1] == target[j - 1]:
            cost, path = walk(i - 1, j - 1)
            return cost, (*path, "kept")
        ways = [
            (walk(i, j - 1), ()),
            (walk(i - 1, j), ("removed",)),
            (walk(i - 1, j - 1), ("replaced",)),
        ]
        (cost, path), last = min(ways, key=lambda way: way[0][0])
        return cost + 1, (*path, *last)

    return list(walk(len(source), len(target))[1])


def total(one: Hypothesis, scale: float) -> float:
    return scale * one.acoustic + one.ngram + one.bonus


def plain_augment(
    hypotheses: list[Hypothesis], scale: float, top: int, penalty: float
) -> dict[str, tuple[float, float]]:
    """Section by section as the published server describes it, with no shortcut."""
    # Totals that differ by rounding alone are equal.
    ranked = sorted(hypotheses, key=lambda one: (-round(total(one, scale), 6), one.words))
    scores = {one.sentence: (one.acoustic, one.ngram) for one in ranked}
    for i in range(min(top, len(ranked))):
        for j in range(i + 1, min(top, len(ranked))):
            one, other = ranked[i], ranked[j]
            if len(one.words) != len(other.words):
                continue
            places = [
                k for k, what in enumerate(edit(one.words, other.words)) if what == "replaced"
            ]
            others = [
                k for k, what in enumerate(edit(other.words, one.words)) if what == "replaced"
            ]
            for a, b in zip(places, others, strict=False):
                first, second = list(one.words), list(other.words)
                first[a], second[b] = other.words[b], one.words[a]
                for words in (first, second):
                    if " ".join(words) not in scores:
                        acoustic = float(np.mean([one.acoustic, other.acoustic]))
                        ngram = float(np.mean([one.ngram, other.ngram]))
                        scores[" ".join(words)] = (
                            acoustic - penalty * abs(acoustic),
                            ngram - penalty * abs(ngram),
                        )
    return scores


def found(hypotheses: list[Hypothesis], top: int = 20, penalty: float = 0.01) -> dict[str, tuple]:
    made = augmented(hypotheses, SCALE, top, penalty)
    scores = {one.sentence: (one.acoustic, one.ngram) for one in made}
    assert len(scores) == len(made), "a sentence stands there twice"
    return scores


words = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=0, max_size=9)
# Libraries that flush subnormal numbers to zero make ties of them, in one of the two only.
score = st.floats(-90.0, 5.0, allow_subnormal=False)


@st.composite
def lists(draw: st.DrawFn) -> list[Hypothesis]:
    sentences = draw(st.lists(words.map(tuple), min_size=1, max_size=8, unique=True))
    return [Hypothesis(one, draw(score), draw(score)) for one in sentences]


@pytest.mark.slow
@given(lists(), st.integers(0, 6), st.sampled_from([0.0, 0.01, 0.5]))
@settings(max_examples=300)
def test_it_makes_what_the_plain_version_makes(
    hypotheses: list[Hypothesis], top: int, penalty: float
) -> None:
    expected = plain_augment(hypotheses, SCALE, top, penalty)
    made = found(hypotheses, top, penalty)
    assert made.keys() == expected.keys()
    for sentence, scores in expected.items():
        assert made[sentence] == pytest.approx(scores)


@given(lists())
@settings(max_examples=100)
def test_old_candidates_keep_their_scores_and_the_best_stays_the_best(
    hypotheses: list[Hypothesis],
) -> None:
    made = augmented(hypotheses, SCALE, 20, 0.01)
    assert set(hypotheses) <= {dataclasses.replace(one, total=None) for one in made}
    totals = [total(one, SCALE) for one in made]
    assert totals == [one.total for one in made]
    assert totals == sorted(totals, reverse=True) or np.allclose(
        totals, sorted(totals, reverse=True), atol=1e-6
    )
    best = max(total(one, SCALE) for one in hypotheses)
    assert totals[0] == pytest.approx(best, abs=1e-6)


def test_two_words_found_apart_come_together() -> None:
    made = found([hypothesis("the bat sat", -10.0, -4.0), hypothesis("a bat sad", -12.0, -6.0)])
    worse = (-11.0 * 1.01, -5.0 * 1.01)
    assert made == {
        "the bat sat": (-10.0, -4.0),
        "a bat sad": (-12.0, -6.0),
        "a bat sat": pytest.approx(worse),
        "the bat sad": pytest.approx(worse),
    }


def test_positive_scores_are_made_worse_too() -> None:
    made = found([hypothesis("a b", 10.0, 2.0), hypothesis("c d", 10.0, 2.0)], penalty=0.1)
    assert made["a d"] == pytest.approx((9.0, 1.8))


def test_sentences_of_different_lengths_exchange_nothing() -> None:
    assert len(found([hypothesis("a b", -1.0, 0.0), hypothesis("c d e", -2.0, 0.0)])) == 2


def test_only_the_best_take_part() -> None:
    three = [
        hypothesis("a b", -1.0, 0.0),
        hypothesis("a c", -2.0, 0.0),
        hypothesis("d e", -3.0, 0.0),
    ]
    assert found(three, top=2).keys() == {"a b", "a c", "d e"}
    assert len(found(three, top=3)) > 3
    assert found(three, top=0).keys() == {"a b", "a c", "d e"}


@pytest.mark.slow
def test_the_work_on_the_longest_sentences_is_bounded_and_comes_in_short_slices() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2000, 1200).astype(str)
    lists = []
    for number in range(40):
        changed = words.copy()
        changed[rng.integers(0, 1200, 6)] = rng.integers(0, 2000, 6).astype(str)
        lists.append(Hypothesis(tuple(changed), -float(number), 0.0))
    slices, started = [], time.thread_time()
    work = augment(lists, SCALE, 40, 0.01)
    while True:
        before = time.thread_time()
        try:
            next(work)
        except StopIteration as end:
            made = end.value
            break
        finally:
            slices.append(time.thread_time() - before)
    assert len(made) > len(lists)
    assert sum(len(one.words) for one in made) < 3_000_000
    # Without bounds it is minutes. A slice is 40 ms at most, and the last one sorts.
    assert time.thread_time() - started < 20
    assert max(slices[:-1]) < 1


def test_a_shifted_word_is_an_insertion_and_a_removal_not_an_exchange() -> None:
    made = found([hypothesis("a b", -1.0, 0.0), hypothesis("b c", -2.0, 0.0)])
    assert made.keys() == {"a b", "b c"}


def test_the_pairs_bonus_is_their_mean() -> None:
    made = augmented(
        [hypothesis("a b", -1.0, 0.0, 2.0), hypothesis("c d", -2.0, 0.0, 4.0)], SCALE, 20, 0.01
    )
    assert {one.bonus for one in made if one.sentence in ("a d", "c b")} == {3.0}
