"""Claims about error rates, checked against a Levenshtein written out here; against jiwer in
tests/parity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2txt_jax.metrics import (
    ErrorRate,
    differences,
    edit_distance,
    error_rate,
    greedy_decode,
    phoneme_error_rates,
    total,
    total_by,
    word_error_rates,
)
from b2txt_jax.phonemes import SILENCE_ID, sentence_to_ids
from lm_server.protocol import ProtocolError

WORDS = st.lists(st.sampled_from(["a", "be", "sea", "do", "eh"]), max_size=9)


def levenshtein(first: list, second: list) -> int:
    """The textbook table."""
    table = list(range(len(second) + 1))
    for row, left in enumerate(first, start=1):
        diagonal, table[0] = table[0], row
        for column, right in enumerate(second, start=1):
            substituted = diagonal + (left != right)
            diagonal = table[column]
            table[column] = min(substituted, table[column] + 1, table[column - 1] + 1)
    return table[-1]


def frames_of(classes: list[int]) -> np.ndarray:
    """Logits [P, 41] whose best class in frame p is classes[p]."""
    return np.eye(41, dtype=np.float32)[classes] if classes else np.zeros((0, 41), np.float32)


@given(WORDS, WORDS)
def test_edit_distance_is_levenshteins(first: list[str], second: list[str]) -> None:
    assert edit_distance(first, second) == levenshtein(first, second)


def test_distances_do_not_depend_on_hashes() -> None:
    assert hash(-1) == hash(-2)
    assert edit_distance([-1, "a"], [-2, 97]) == 2


def test_hand_worked_sentence() -> None:
    # cat -> hat (substitution), "the" before "mat" missed (deletion), "now" added (insertion).
    rates = word_error_rates(["The cat sat on the mat!"], ["the hat sat on mat now"])
    assert rates == [ErrorRate(3, 6)]


def test_punctuation_and_case_are_no_errors() -> None:
    assert word_error_rates(["It's fine, OK?"], ["it's fine ok"]) == [ErrorRate(0, 3)]


def test_words_decoded_where_nothing_was_said_are_errors_without_a_rate() -> None:
    (rate,) = word_error_rates(["..."], ["hello there"])
    assert rate == ErrorRate(2, 0)
    assert rate.rate is None


def test_an_aggregate_divides_once_and_so_weighs_by_length() -> None:
    rates = [ErrorRate(1, 1), ErrorRate(0, 9)]
    assert total(rates).rate == pytest.approx(0.1)  # the mean of the rates would be 0.5


def test_the_total_of_nothing_has_no_rate() -> None:
    assert total([]) == ErrorRate(0, 0)
    assert total([]).rate is None


def test_a_rate_may_exceed_one() -> None:
    assert error_rate(["a"], ["b", "c", "d"]).rate == 3.0


@pytest.mark.parametrize(("errors", "length"), [(-1, 3), (1, -3)])
def test_an_impossible_rate_is_refused(errors: int, length: int) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        ErrorRate(errors, length)


def test_groups_keep_the_order_in_which_they_appear_and_sum_to_the_total() -> None:
    rates = [ErrorRate(1, 4), ErrorRate(2, 5), ErrorRate(3, 6)]
    groups = total_by(["day 2", "day 1", "day 2"], rates)
    assert list(groups.items()) == [("day 2", ErrorRate(4, 10)), ("day 1", ErrorRate(2, 5))]
    assert total(groups.values()) == total(rates)


def test_lists_of_different_lengths_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="found 1 keys and 2 rates"):
        total_by(["a"], [ErrorRate(0, 1)] * 2)
    with pytest.raises(ValueError, match="found 2 true sentences and 1 decoded"):
        word_error_rates(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="found 0 labels and 1 decoded"):
        phoneme_error_rates([], [np.array([1])])


@pytest.mark.parametrize(
    ("best", "decoded"),
    [
        ([], []),
        ([0, 0, 0], []),
        ([5, 5, 5], [5]),
        ([5, 0, 5], [5, 5]),
        ([0, 3, 3, 0, 0, 4, 40, 40, 0], [3, 4, 40]),
        ([7, 8, 7], [7, 8, 7]),
    ],
)
def test_greedy_decoding_collapses_repeats_then_drops_blanks(
    best: list[int], decoded: list[int]
) -> None:
    assert greedy_decode(frames_of(best)).tolist() == decoded


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 3))
def test_greedy_decoding_inverts_any_alignment_with_blanks_between(
    label: list[int], repeats: int
) -> None:
    frames = [index for phoneme in label for index in [0, *[phoneme] * repeats]]
    assert greedy_decode(frames_of(frames)).tolist() == label


def test_greedy_decoding_refuses_logits_that_are_not_finite() -> None:
    logits = frames_of([1, 2])
    logits[1, 7] = np.nan
    with pytest.raises(ProtocolError, match="frame 1"):
        greedy_decode(logits)


def test_greedy_decoding_refuses_another_number_of_classes() -> None:
    with pytest.raises(ProtocolError, match="41"):
        greedy_decode(np.zeros((3, 40), np.float32))


def test_silence_counts_as_a_phoneme() -> None:
    label = sentence_to_ids(["hello", "world"])
    without = label[label != SILENCE_ID]
    assert phoneme_error_rates([label], [without]) == [ErrorRate(2, 10)]


@given(WORDS, WORDS)
def test_differences_give_back_both_sentences_and_the_distance(
    first: list[str], second: list[str]
) -> None:
    found = differences(first, second)
    assert [word for part in found for word in part.reference] == first
    assert [word for part in found for word in part.decoded] == second
    wrong = [part for part in found if not part.same]
    assert sum(max(len(p.reference), len(p.decoded)) for p in wrong) == levenshtein(first, second)
    assert all(part.reference == part.decoded for part in found if part.same)
