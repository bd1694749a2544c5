"""The messages survive their trip, and broken ones are refused with a reason."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lm_server.hypothesis import Hypothesis
from lm_server.protocol import (
    CLASSES,
    LM_CLASSES,
    MAX_MESSAGE_FRAMES,
    ProtocolError,
    decode_logits,
    decode_scoring,
    encode_logits,
    encode_scoring,
    to_lm_order,
    to_rnn_order,
)

finite = st.floats(-1e30, 1e30)
logits_arrays = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 7), st.just(41)),
    elements=st.integers(-(2**15), 2**15).map(lambda number: number / 64),
)
words = st.text(st.characters(blacklist_characters=";", blacklist_categories=["Cs", "Z", "Cc"]))
sentences = st.lists(words.filter(bool)).map(tuple)
hypotheses = st.builds(Hypothesis, sentences, finite, finite, st.floats(-1e30, -1e-9), total=finite)


def test_the_published_orders_of_the_classes():
    # Written out from the reference: blank, 39 phonemes, silence; and silence moved to place 1.
    phonemes = [
        "AA",
        "AE",
        "AH",
        "AO",
        "AW",
        "AY",
        "B",
        "CH",
        "D",
        "DH",
        "EH",
        "ER",
        "EY",
        "F",
        "G",
        "HH",
        "IH",
        "IY",
        "JH",
        "K",
        "L",
        "M",
        "N",
        "NG",
        "OW",
        "OY",
        "P",
        "R",
        "S",
        "SH",
        "T",
        "TH",
        "UH",
        "UW",
        "V",
        "W",
        "Y",
        "Z",
        "ZH",
    ]
    assert list(CLASSES) == ["BLANK", *phonemes, " | "]
    assert list(LM_CLASSES) == ["BLANK", " | ", *phonemes]


@given(logits_arrays)
def test_reordering_classes_moves_the_last_column_to_place_one_and_back(logits):
    moved = to_lm_order(logits)
    expected = np.concatenate([logits[:, :1], logits[:, -1:], logits[:, 1:-1]], axis=-1)
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(to_rnn_order(moved), logits)


@given(logits_arrays)
def test_logits_survive_the_wire(logits):
    payload = encode_logits(logits)
    assert payload == np.asarray(logits, "<f4").tobytes()
    np.testing.assert_array_equal(decode_logits(payload), logits)


@given(st.lists(hypotheses))
def test_scoring_survives_the_wire(candidates):
    assert decode_scoring(encode_scoring(candidates)) == candidates


def test_an_absent_llm_score_is_written_as_zero_like_published_servers_do():
    text = encode_scoring([Hypothesis(("a", "b"), -1.0, -2.0, total=-3.0)])
    assert text == "a b;-1.0;-2.0;0.0;-3.0"
    assert decode_scoring(text)[0].llm is None


def test_candidates_that_are_not_ranked_are_not_sent():
    with pytest.raises(ValueError, match="no total"):
        encode_scoring([Hypothesis(("a",), -1.0, -2.0)])


def test_a_sentence_with_the_separator_is_refused():
    with pytest.raises(ProtocolError, match="';'"):
        encode_scoring([Hypothesis(("a;b",), 0.0, 0.0, total=0.0)])


@pytest.mark.parametrize("text", ["a;1;2;3", "a;1;2;3;4;b", "a;1;2;3;x"])
def test_broken_scoring_is_refused(text):
    with pytest.raises(ProtocolError):
        decode_scoring(text)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\0" * 163, "163 bytes; needed a multiple of 164"),
        (np.full((2, 41), np.nan, "<f4").tobytes(), "NaN"),
        (np.full((2, 41), np.inf, "<f4").tobytes(), "infinite"),
        (bytes(164 * (MAX_MESSAGE_FRAMES + 1)), "at most"),
    ],
)
def test_broken_logits_are_refused_with_the_reason(payload, reason):
    with pytest.raises(ProtocolError, match=reason):
        decode_logits(payload)


@pytest.mark.parametrize("kind", [">f4", "<f2", "<f8"])
@pytest.mark.parametrize("made", ["drawn", "rounded", "log-probabilities", "of two values"])
def test_numbers_of_another_type_are_named(kind, made):
    logits = np.random.default_rng(3).normal(0, 6, (2, 41))
    if made == "rounded":
        logits = logits.astype(np.float32).round(2)
    elif made == "of two values":
        logits = 6 * np.sign(logits)
    elif made == "log-probabilities":
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    name = {">f4": "big-endian float32", "<f2": "float16", "<f8": "float64"}[kind]
    with pytest.raises(ProtocolError, match=f"logits look like {name}; needed"):
        decode_logits(logits.astype(kind).tobytes())
    decode_logits(logits.astype("<f4").tobytes())


@pytest.mark.parametrize("odd", [-1e30, 1e-30, -1e4, 1e6, -1e-8, 0.0])
@pytest.mark.parametrize("other", [0.0, 25.0, -1.5])
def test_float32_with_extreme_values_is_taken_as_it_is(odd, other):
    logits = np.full((3, 41), other, np.float32)
    logits[:, ::2] = odd
    np.testing.assert_array_equal(decode_logits(logits.tobytes()), logits)


@pytest.mark.parametrize("shape", [(41,), (3, 40), (1, 3, 41)])
def test_logits_of_another_shape_are_not_sent(shape):
    with pytest.raises(ProtocolError, match="needed \\[frames, 41\\]"):
        encode_logits(np.zeros(shape, np.float32))
