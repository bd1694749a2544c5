"""Words that no dictionary has get pronunciations that one would recognise."""

import numpy as np
import pytest

from lm_server.lexicon.g2p import graphone, pronounce, read_model
from lm_server.lexicon.pronunciations import LexiconError, read_lexicon
from lm_server.lm.estimate.g2p_training import align, errors, train
from lm_server.protocol import PHONEMES


@pytest.fixture(scope="module")
def cmu():
    """The dictionary: word -> pronunciations."""
    return read_lexicon("cmudict").entries


@pytest.fixture(scope="module")
def sample(cmu):
    return sorted(cmu)[::37]


def edit_distance(one, other):
    rows = np.arange(len(other) + 1)
    for i, a in enumerate(one, 1):
        diagonal, rows[0] = rows[0], i
        for j, b in enumerate(other, 1):
            diagonal, rows[j] = rows[j], min(rows[j] + 1, rows[j - 1] + 1, diagonal + (a != b))
    return rows[-1]


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("blicks", "B L IH K S"),
        ("tweeting", "T W IY T IH NG"),
        ("unfriended", "AH N F R EH N D IH D"),
        ("brainwave's", "B R EY N W EY V Z"),
        ("chatbots", "CH AE T B AA T S"),
    ],
)
def test_new_words_are_said_as_people_say_them(word, phones, cmu):
    assert word not in cmu
    assert tuple(phones.split()) in pronounce(word, 5)


def test_the_shipped_model_knows_the_words_that_it_was_made_of(cmu, sample):
    words = sample[::12]
    said = {word: pronounce(word, 3) for word in words}
    wrong, phone_errors = errors(said, {word: cmu[word] for word in words})
    # On words that it has not seen it is wrong three times in ten (`scripts/make_g2p.py`).
    assert wrong < 0.2
    assert phone_errors < 0.06


def test_a_model_of_some_words_says_others_far_better_than_chance(tmp_path, cmu, sample):
    seen = [(word, one) for word in sample for one in cmu[word]]
    figures = train(seen, tmp_path / "small.bin", 4, 50_000, tmp_path)
    assert figures["words"] > 0.95 * len(seen)
    model = read_model(tmp_path / "small.bin")
    others = sorted(cmu)[5::1700]
    said = {word: pronounce(word, 3, model) for word in others}
    wrong, phone_errors = errors(said, {word: cmu[word] for word in others})
    # By 3,400 words; letters alone would not get a third of the phonemes right.
    assert phone_errors < 0.3
    assert wrong < 0.9


def test_letters_are_aligned_with_what_they_say(cmu):
    words = ["box", "fox", "ox", "see", "bee", "sob", "fib", "if", "six"]
    aligned = dict(align([(word, cmu[word][0]) for word in words], rounds=20))
    assert aligned["box"] == (("B",), ("AA",), ("K", "S"))
    assert aligned["fib"] == (("F",), ("IH",), ("B",))
    for word, parts in aligned.items():
        assert len(parts) == len(word)
        assert tuple(phone for part in parts for phone in part) == cmu[word][0]


def test_words_with_more_phonemes_than_letters_can_say_are_not_aligned(cmu):
    assert align([("w", cmu["w"][0])]) == []


def test_pronunciations_are_distinct_and_no_more_than_wanted():
    for limit in (1, 2, 5):
        said = pronounce("wugs", limit)
        assert 1 <= len(said) <= limit
        assert len(set(said)) == len(said)
        assert set(said[0]) <= set(PHONEMES)


def test_the_parts_around_a_hyphen_are_said_one_after_the_other():
    assert pronounce("blick-dax")[0] == pronounce("blick")[0] + pronounce("dax")[0]


def test_a_word_of_thirty_parts_is_said_at_once_and_not_in_all_combinations():
    assert pronounce("a-" * 29 + "a")[0] == 30 * pronounce("a")[0]


@pytest.mark.parametrize("word", ["", "'", "--", "Word", "caf\u00e9", "r2d2", "a b", "a" * 61])
def test_what_cannot_be_said_is_refused(word):
    with pytest.raises(LexiconError, match="give its pronunciation"):
        pronounce(word)


def test_errors_are_counted_against_the_nearest_variant():
    truth = {"a": (("AH",), ("EY",)), "cat": (("K", "AE", "T"),)}
    said = {"a": (("EY",), ("AH",)), "cat": (("K", "AE", "D", "Z"),)}
    assert errors(said, truth) == (0.5, 2 / 4)
    assert edit_distance(said["cat"][0], truth["cat"][0]) == 2


def test_a_graphone_says_letter_and_phonemes():
    assert (graphone("x", ("K", "S")), graphone("e", ())) == ("x:K_S", "e:")
