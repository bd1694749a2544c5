"""Claims about the normalisation of sentences for scoring."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_server.lexicon.text_rules import normalise, scored_words

# What the published evaluation's function returns for these, found by running it.
PUBLISHED = [
    ("Hello, World!", "hello world"),
    ("It's well-known.", "it's well-known"),
    ("a -- b", "a - b"),
    ("a--b", "ab"),
    ("a-- b", "a- b"),
    ("a --b", "a b"),
    ("a- b", "a b"),
    ("- a", "a"),
    ("a -", "a -"),
    ("---", "-"),
    ("----", ""),
    ("a --- b", "a b"),
    ("a---b", "a-b"),
    ("'tis", "'tis"),
    ("so 'tis", "so'tis"),
    ("the 'quick' fox", "the'quick' fox"),
    ("''", "''"),
    ("' a", "' a"),
    ("a '", "a'"),
    ("a - 'b", "a 'b"),
    ("a- 'b", "a'b"),
    ("a -'b", "a -'b"),
    ("1st of May", "st of may"),
    ("caf\u00e9", "caf"),
    ("a\tb", "ab"),
    ("a\nb", "ab"),
    ("don\u2019t", "dont"),
    ("A.B.C.", "abc"),
    ("a -- 'b'", "a -'b'"),
    ("-a-", "-a-"),
    ("a -, b", "a b"),
    ("a -.- b", "a - b"),
    ("x - - - y", "x y"),
    ("", ""),
    ("   ", ""),
]

AWKWARD = st.text(alphabet="aB -'.,1\t\u00e9", max_size=30)


def replaced(text: str, old: str, new: str) -> str:
    """str.replace, written out: leftmost occurrences that do not overlap."""
    out, place = "", 0
    while place < len(text):
        if text[place : place + len(old)] == old:
            out, place = out + new, place + len(old)
        else:
            out, place = out + text[place], place + 1
    return out


@pytest.mark.parametrize(("sentence", "expected"), PUBLISHED)
def test_normalises_as_the_published_evaluation_does(sentence: str, expected: str) -> None:
    assert normalise(sentence) == expected


@given(AWKWARD)
def test_equals_the_rules_applied_one_by_one_in_their_order(sentence: str) -> None:
    text = "".join(c for c in sentence if c in string.ascii_letters + "- '")
    for old, new in (("- ", " "), ("--", ""), (" '", "'")):
        text = replaced(text, old, new)
    assert normalise(sentence) == " ".join(word for word in text.lower().split(" ") if word)


@given(st.text(max_size=40))
def test_keeps_only_lower_case_letters_hyphens_apostrophes_and_single_spaces(sentence: str) -> None:
    found = normalise(sentence)
    assert set(found) <= set(string.ascii_lowercase + "-' ")
    assert "  " not in found
    assert found == found.strip()


def test_an_ordinary_sentence_is_scored_word_by_word() -> None:
    assert scored_words("Well, I don't know - do you?") == (
        "well",
        "i",
        "don't",
        "know",
        "do",
        "you",
    )


def test_a_sentence_without_letters_has_no_words() -> None:
    assert scored_words("42!") == ()
