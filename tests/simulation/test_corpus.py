"""The sentences keep their promises: they can be pronounced, and no pool knows another's."""

from __future__ import annotations

import importlib.resources

import pytest

from b2txt_jax.phonemes import pronunciations, sentence_to_ids
from b2txt_jax.simulation.corpus import CORPORA, language_model_text, load_pool
from lm_server.lexicon.text_rules import normalise

POOLS = ("train", "val", "test")


@pytest.mark.parametrize("pool", POOLS)
def test_every_sentence_has_3_to_12_words_of_the_cmu_dictionary(pool: str) -> None:
    dictionary = pronunciations()
    for sentence, corpus in load_pool(pool):
        words = normalise(sentence).split()
        assert 3 <= len(words) <= 12
        assert all(word in dictionary for word in words), sentence
        assert corpus in CORPORA


@pytest.mark.parametrize("pool", POOLS)
def test_every_sentence_fits_the_padded_label_and_keeps_its_words(pool: str) -> None:
    for sentence, _ in load_pool(pool):
        assert len(sentence) < 500
        assert len(sentence_to_ids(normalise(sentence).split())) < 500
        assert sentence.isascii()
        # No character takes part of a word with it when the sentence is scored.
        assert len(normalise(sentence).split()) == len(sentence.split())


def test_the_pools_suffice_for_as_many_sentences_as_were_published() -> None:
    sizes = {pool: len(load_pool(pool)) for pool in POOLS}
    assert sizes["train"] >= 8_072
    assert sizes["val"] >= 1_426
    assert sizes["test"] >= 1_450
    for pool in POOLS:
        assert {corpus for _, corpus in load_pool(pool)} == set(CORPORA)


def test_no_normalised_sentence_is_in_two_pools_or_in_the_text_of_the_language_model() -> None:
    pools = [[normalise(sentence) for sentence, _ in load_pool(pool)] for pool in POOLS]
    everything = [*pools[0], *pools[1], *pools[2], *language_model_text()]
    assert len(everything) == len(set(everything))


def test_no_line_of_the_language_model_holds_a_long_enough_val_or_test_sentence() -> None:
    held_out = {normalise(s) for pool in ("val", "test") for s, _ in load_pool(pool)}
    # Padded with spaces, a substring is a run of whole words: an independent way to look for runs.
    text_of_all = "\n".join(f" {line} " for line in language_model_text())
    sentences = sorted(s for s in held_out if len(s.split()) >= 4)[::25]
    assert len(sentences) > 100
    assert [s for s in sentences if f" {s} " in text_of_all] == []


def test_the_text_of_the_language_model_is_normalised_and_large() -> None:
    lines = language_model_text()
    assert all(normalise(line) == line for line in lines[::50])
    assert sum(len(line.split()) for line in lines) > 1_500_000


def test_the_files_take_at_most_five_megabytes_and_carry_their_licences() -> None:
    folder = importlib.resources.files("b2txt_jax.simulation") / "corpus"
    sizes = [len(entry.read_bytes()) for entry in folder.iterdir()]
    assert sum(sizes) <= 5_000_000
    notice = (folder / "NOTICE").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice
    assert "World English Bible: public domain" in notice
