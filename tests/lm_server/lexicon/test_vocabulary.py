"""The words of a model are those asked for, and none of them without a pronunciation."""

from collections import Counter

import pytest

from lm_server.lexicon.pronunciations import Lexicon, LexiconError
from lm_server.lexicon.vocabulary import SEEN_LEAST, choose_vocabulary, read_word_list

LEXICON = Lexicon({"the": (("DH", "AH"),), "cat": (("K", "AE", "T"),), "zebra": (("Z", "IY"),)})
SEEN = Counter({"the": 50, "glorp": 20, "cat": 10, "blorked": SEEN_LEAST, "slip": SEEN_LEAST - 1})


def test_by_default_the_whole_lexicon_is_known_and_nothing_else():
    assert choose_vocabulary(SEEN, LEXICON, None, False).lexicon == LEXICON


def test_frequent_words_that_the_lexicon_lacks_are_guessed_when_asked_for():
    chosen = choose_vocabulary(SEEN, LEXICON, None, True)
    assert list(chosen.lexicon.entries) == ["the", "cat", "zebra", "blorked", "glorp"]
    assert chosen.guessed == 2
    assert chosen.lexicon.entries["glorp"][0] == ("G", "L", "AO", "R", "P")


@pytest.mark.parametrize(
    ("limit", "guess", "words"),
    [
        (1, False, ["the"]),
        (2, False, ["the", "cat"]),
        (2, True, ["the", "glorp"]),
        (99, False, ["the", "cat"]),
        (99, True, ["the", "glorp", "cat", "blorked", "slip"]),
    ],
)
def test_the_most_frequent_words_are_chosen(limit, guess, words):
    chosen = choose_vocabulary(SEEN, LEXICON, limit, guess)
    assert list(chosen.lexicon.entries) == words
    assert chosen.guessed == sum(word not in LEXICON for word in words)
    assert chosen.left_out == (
        0 if guess or limit < 2 else sum(w not in LEXICON for w in SEEN) if limit > 2 else 1
    )


def test_listed_words_are_all_there_or_the_missing_ones_are_named():
    chosen = choose_vocabulary(SEEN, LEXICON, ["zebra", "glorp"], True)
    assert list(chosen.lexicon.entries) == ["zebra", "glorp"]
    with pytest.raises(LexiconError, match=r"1 words .* not in the lexicon, among them glorp: add"):
        choose_vocabulary(SEEN, LEXICON, ["zebra", "glorp"], False)


def test_a_word_list_is_read_without_repetitions(tmp_path):
    (tmp_path / "words.txt").write_text("The 500\n\ncat\nTHE\nx-ray\n")
    assert read_word_list(tmp_path / "words.txt") == ["the", "cat", "x-ray"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("the\nr2d2\n", "line 2: 'r2d2' is no word"), ("\n", "holds no word"), (None, "there is no")],
)
def test_a_word_list_that_cannot_be_used_is_refused(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "words.txt").write_text(content)
    with pytest.raises(LexiconError, match=reason):
        read_word_list(tmp_path / "words.txt")


def test_no_words_are_not_a_vocabulary():
    with pytest.raises(LexiconError, match="0 words; needed at least 1"):
        choose_vocabulary(SEEN, LEXICON, 0, False)


@pytest.mark.parametrize(
    ("name", "reason"), [("words.txt", "is not UTF-8 text"), ("words.gz", "is a damaged archive")]
)
def test_a_word_list_that_is_no_text_is_refused(tmp_path, name, reason):
    (tmp_path / name).write_bytes(bytes(range(128, 256)) * 9)
    with pytest.raises(LexiconError, match=reason):
        read_word_list(tmp_path / name)
