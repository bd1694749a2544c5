"""Greedy decoding, PER and WER against torch, jiwer and an edit distance by its definition."""

import jiwer
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published import distance, greedy

from b2txt_jax.metrics import (
    ErrorRate,
    edit_distance,
    error_rate,
    greedy_decode,
    phoneme_error_rates,
    total,
    word_error_rates,
)

WORDS = st.lists(st.sampled_from(["a", "be", "sea", "do", "it's", "well-known"]), max_size=9)
PHONEMES = st.lists(st.integers(1, 40), max_size=40)
FEW_PHONEMES = st.lists(st.integers(1, 2), max_size=25)


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.sampled_from([0.1, 1.0, 20.0]))
def test_greedy_decoding_is_torchs_argmax_collapsed(seed, frames, blank):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(frames, 41)).astype(np.float32)
    # Runs of one class and stretches of blanks, as in trained logits.
    logits[np.arange(frames), np.repeat(rng.integers(0, 41, frames // 3 + 1), 3)[:frames]] += 5
    logits[rng.random(frames) < 0.5, 0] += blank
    assert greedy_decode(logits).tolist() == greedy(torch.tensor(logits))


@given(st.one_of(PHONEMES, FEW_PHONEMES), st.one_of(PHONEMES, FEW_PHONEMES))
@example([], [])
@example([1], [])
@example([1, 2] * 12, [2, 1] * 12)
@example([1] * 25, [1] * 24)
@example([3, *[1] * 20], [*[1] * 20, 3])
@example(list(range(1, 41)), list(range(40, 0, -1)))
def test_phoneme_errors_are_levenshteins_and_jiwers(label, decoded):
    expected = distance(label, decoded)
    assert edit_distance(label, decoded) == expected
    (rate,) = phoneme_error_rates([np.array(label)], [np.array(decoded)])
    assert rate == ErrorRate(expected, len(label))
    if label:
        as_words = (" ".join(f"p{k}" for k in side) for side in (label, decoded))
        assert rate.rate == pytest.approx(jiwer.wer(*as_words))


@given(WORDS.filter(bool), WORDS)
@example(["a", "be"] * 4, ["be", "a"] * 4)
@example(["a"], ["a"] * 9)
def test_word_errors_are_levenshteins_and_jiwers(true, decoded):
    (rate,) = word_error_rates([" ".join(true)], [" ".join(decoded)])
    assert rate == ErrorRate(distance(true, decoded), len(true))
    assert rate.rate == pytest.approx(jiwer.wer(" ".join(true), " ".join(decoded)))


@settings(max_examples=30)
@given(st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=8))
def test_aggregate_word_error_rate_is_jiwers_over_all_sentences(pairs):
    true, decoded = ([" ".join(words) for words in side] for side in zip(*pairs, strict=True))
    assert total(word_error_rates(true, decoded)).rate == pytest.approx(jiwer.wer(true, decoded))


def test_long_random_sequences_have_the_distance_of_the_definition():
    rng = np.random.default_rng(0)
    for classes in (2, 5, 40):
        first, second = (rng.integers(0, classes, size).tolist() for size in (150, 170))
        assert error_rate(first, second) == ErrorRate(distance(first, second), 150)
