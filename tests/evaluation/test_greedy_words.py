"""Claims about words looked up without a language model."""

import pytest

from b2txt_jax.evaluation.greedy_words import greedy_words, words_by_pronunciation
from b2txt_jax.metrics import edit_distance, error_rate, total
from b2txt_jax.phonemes import PHONEME_IDS, SILENCE_ID, pronunciations, sentence_to_ids
from b2txt_jax.simulation.corpus import load_pool
from lm_server.lexicon.text_rules import scored_words


def ids(text: str) -> list[int]:
    return [SILENCE_ID if name == "|" else PHONEME_IDS[name] for name in text.split()]


def test_a_sentence_decoded_without_error_gives_its_words() -> None:
    words = ("this", "is", "a", "simple", "question")
    assert greedy_words(sentence_to_ids(words)) == words


def test_the_last_word_needs_no_silence_after_it() -> None:
    assert greedy_words(ids("DH AH | K AE T")) == ("the", "cat")


def test_repeated_and_leading_silences_make_no_words() -> None:
    assert greedy_words(ids("| | K AE T | |")) == ("cat",)


def test_silence_alone_is_no_word() -> None:
    assert greedy_words([SILENCE_ID]) == greedy_words([]) == ()


def test_among_words_that_sound_alike_the_common_one_wins() -> None:
    assert greedy_words(ids("T UW | F AO R | Y UW | SH IY | AA R")) == (
        *("to", "for", "you", "she"),
        "are",
    )


def test_spelling_alone_costs_few_errors_when_every_phoneme_is_right() -> None:
    sentences = [scored_words(text) for text, _ in load_pool("val")[:300]]
    found = [greedy_words(sentence_to_ids(words)) for words in sentences]
    rate = total(error_rate(*pair) for pair in zip(sentences, found, strict=True)).rate
    assert rate is not None
    assert rate < 0.03


def test_a_preferred_pronunciation_wins_over_another_words_second_one() -> None:
    # DH IY is the second way to say "the" and the first to say "thee".
    assert ("DH", "IY") in pronunciations()["the"]
    assert greedy_words(ids("DH IY")) == ("thee",)


def test_an_unmatched_group_is_one_wrong_word_even_if_its_letters_spell_the_truth() -> None:
    found = greedy_words(ids("K | K AE T"))
    assert found == ("<K>", "cat")
    assert edit_distance(scored_words("k cat"), found) == 1


def test_every_word_found_is_one_that_scoring_can_match() -> None:
    for word in words_by_pronunciation().values():
        assert scored_words(word) == (word,)


@pytest.mark.parametrize("wrong", [0, 41, -1])
def test_ids_that_are_no_phonemes_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"class id {wrong} "):
        greedy_words([3, wrong])
