"""Claims about the consensus of several systems, against brute force on tiny lists."""

import itertools
import random

import numpy as np
import pytest

from lm_server.rescoring.consensus import minimum_bayes_risk, rover, shares, together

WORDS = "abc"


def distance(one, other):
    """Edit distance, by the definition."""
    if not one or not other:
        return len(one) + len(other)
    rest = distance(one[1:], other[1:]) + (one[0] != other[0])
    return min(rest, distance(one[1:], other) + 1, distance(one, other[1:]) + 1)


def sentences(rng, most):
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 4))) for _ in range(rng.randint(1, most))]


@pytest.mark.parametrize("seed", range(30))
def test_the_chosen_hypothesis_has_the_fewest_expected_errors_of_all(seed):
    rng = random.Random(seed)
    systems = [[(s, rng.uniform(-6, 0)) for s in sentences(rng, 4)] for _ in range(3)]
    weights = {}
    for hypotheses in systems:
        every = sum(np.exp(total / 2.0) for _, total in hypotheses)
        for text, total in hypotheses:
            weights[text] = weights.get(text, 0.0) + np.exp(total / 2.0) / every / len(systems)
    risks = {
        text: sum(share * distance(text.split(), other.split()) for other, share in weights.items())
        for text in weights
    }
    found = minimum_bayes_risk(systems, temperature=2.0).candidates
    assert {one.sentence for one in found} == set(weights)
    assert [one.expected_errors for one in found] == pytest.approx(sorted(risks.values()))
    assert sum(one.share for one in found) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(30))
def test_rover_is_the_majority_in_each_place_where_only_words_differ(seed):
    """Sentences of unlike words in each place, so that an alignment of the same length is best."""
    rng = random.Random(seed)
    systems = ["".join(rng.choice(place) for place in ("ab", "cd", "ef", "gh")) for _ in range(5)]
    found = rover([[(" ".join(text), None)] for text in systems])
    columns = list(zip(*systems, strict=True))
    majority = [max(sorted(column), key=column.count) for column in columns]
    assert found.candidates[0].sentence.split() == majority
    counts = [column.count(word) / 5 for word, column in zip(majority, columns, strict=True)]
    assert found.word_confidences == pytest.approx(counts)


def test_rover_puts_in_what_most_have_and_leaves_out_what_few_have():
    vote = lambda *texts: rover([[(text, None)] for text in texts]).candidates[0].sentence  # noqa: E731
    assert vote("a b", "a x b", "a x b") == "a x b"
    assert vote("a x b", "a b", "a b") == "a b"
    assert vote("x a b", "a b", "a b y") == "a b"
    assert vote("a b c", "a b", "b c") == "a b c"
    assert vote("only one") == "only one"
    for order in itertools.permutations(["the cat sat", "the cat sat down", "a cat sat"]):
        assert vote(*order) == "the cat sat"


def test_rover_weighs_votes():
    systems = [[("a", None)], [("b", None)], [("b", None)]]
    assert rover(systems).candidates[0].sentence == "b"
    assert rover(systems, [3.0, 1.0, 1.0]).candidates[0].sentence == "a"


def test_spellings_of_the_same_words_are_one_hypothesis():
    found = shares([[("Yes, I can.", None)], [("yes i can", -1.0), ("no", -1.0)]])
    assert found[("yes", "i", "can")] == ("Yes, I can.", 0.75)
    assert found[("no",)][1] == 0.25


def test_a_system_without_an_answer_has_no_part_and_without_any_there_is_an_error():
    assert minimum_bayes_risk([[], [("a", -1.0)]]).candidates[0].share == 1.0
    assert rover([[], [("a", None)]]).word_confidences == (1.0,)
    for method in (minimum_bayes_risk, rover):
        with pytest.raises(ValueError, match="found no hypothesis in any system"):
            method([[], []])


def test_the_confidence_of_a_word_is_the_share_of_what_has_it_in_its_place():
    systems = [[("a b", None)], [("a b", None)], [("a c", None)], [("a", None)]]
    assert minimum_bayes_risk(systems).word_confidences == pytest.approx((1.0, 0.5))


def test_systems_are_weighed_at_the_temperature_of_their_own_confidences():
    """Totals that are ten times too sharp outvote a system that is surer, unless they are cooled:
    shares of "c d" (0.269 + 0.881) / 2 instead of (0.000 + 0.881) / 2."""

    def answer(temperature, **totals):
        nbest = [{"sentence": " ".join(text), "total": one} for text, one in totals.items()]
        return {"trial": "t", "temperature": temperature, "nbest": nbest}

    sure = answer(1.0, cd=0.0, ab=-2.0)
    cooled = together([answer(10.0, ab=0.0, cd=-10.0), sure])
    assert (cooled["sentence"], cooled["confidence"]) == ("c d", pytest.approx(0.5749, abs=1e-4))
    sharp = together([answer(None, ab=0.0, cd=-10.0), sure])
    assert (sharp["sentence"], sharp["confidence"]) == ("a b", pytest.approx(0.5596, abs=1e-4))
