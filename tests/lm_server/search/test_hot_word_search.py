"""Hot words are one search's own: wanted there, unknown elsewhere, gone with their search."""

import gc

import numpy as np
import pytest
from small_model import LEXICON, say

from lm_server.protocol import LM_CLASSES, SILENCE
from lm_server.search.hot_words import MAX_HOT_WORDS, HotWord, HotWordError
from lm_server.search.interface import BackendError
from lm_server.search.load import load_model
from lm_server.settings import PRESETS, Settings

ZADIE = ("Z", "EY", "D", "IY")


@pytest.fixture(scope="module", params=["flashlight", "pyctcdecode"])
def model(request, model_folder):
    return load_model(model_folder, request.param)


@pytest.fixture(scope="module")
def flashlight(model_folder):
    return load_model(model_folder)


def spoken(*said, strength=25.0):
    """Logits of words given by their phonemes."""
    names = [name for phones in said for name in [*phones, SILENCE]]
    rows = [row for name in names for row in [LM_CLASSES.index(name)] * 2 + [0]]
    logits = np.zeros((len(rows), 41), np.float32)
    logits[np.arange(len(rows)), rows] = strength
    return logits


def sentence(search, logits):
    search.step(logits)
    found = search.finish()
    return found[0].sentence if found else ""


def test_a_name_outside_the_vocabulary_is_heard_where_it_is_wanted_and_nowhere_else(model):
    logits = spoken(["DH", "AH"], ZADIE, ["S", "AE", "T"])
    before = model.search(Settings())
    before.step(logits)
    answers = before.finish()
    mine, other = model.search(Settings(), {"Zadie": HotWord(3.0, (ZADIE,))}), before
    assert sentence(mine, logits) == "the zadie sat"
    other.step(logits)
    assert other.finish() == answers
    assert not any("zadie" in one.words for one in answers)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("O\u2019Brien", "o'brien"),
        ("Jos\u00e9", "jose"),
        ("JOSE\u0301", "jose"),
        ("\ufb01ne", "fine"),
    ],
)
def test_a_hot_word_is_written_as_the_lexicon_would(model, given, written):
    logits = spoken(["DH", "AH"], ZADIE, ["S", "AE", "T"])
    hot = {given: HotWord(9.0, (("Z", "EY1", "D", "IY0"),))}
    assert sentence(model.search(Settings(), hot), logits) == f"the {written} sat"
    # And its pronunciation can be guessed.
    model.search(Settings(), {given: HotWord(9.0)})


def test_the_weight_is_in_the_total_and_apart_from_the_other_scores(model):
    logits = spoken(ZADIE, ZADIE)
    plain = Settings(blank_penalty=1.0, silence_penalty=1000.0, max_classes=41, word_bonus=0.5)
    search = model.search(plain, {"zadie": HotWord(3.0, (ZADIE,))})
    search.step(logits)
    best = search.finish()[0]
    assert best.words == ("zadie", "zadie")
    assert best.bonus == pytest.approx(2 * 3.0 + 2 * 0.5)
    assert best.acoustic == pytest.approx(0.0, abs=0.01)
    assert best.total == pytest.approx(0.5 * best.acoustic + best.ngram + 7.0)


def test_a_wanted_word_of_the_vocabulary_wins_over_its_homophones_as_the_lexicon_says_it(model):
    logits = say(["the", "cat", "ate"])
    assert sentence(model.search(Settings()), logits) == "the cat ate"
    assert sentence(model.search(Settings(), {"eight": HotWord(20.0)}), logits) == "the cat eight"


def test_more_wanted_words_said_alike_than_a_trie_node_was_made_for(model):
    names = [f"z{letter}die" for letter in "abcdefghij"]
    hot = {name: HotWord(2.0 + 0.1 * rank, (ZADIE,)) for rank, name in enumerate(names)}
    search = model.search(Settings(nbest=50), hot)
    search.step(spoken(ZADIE))
    found = [one.words[0] for one in search.finish() if len(one.words) == 1]
    assert [name for name in found if name in names] == names[::-1]


def test_a_phoneme_said_twice_in_a_hot_word_needs_its_two_sounds(flashlight):
    hot = {"aah": HotWord(9.0, (("AA", "AA", "T"),))}
    once, twice = spoken(["AA", "T"]), spoken(["AA", "AA", "T"])
    # A search of all classes finds it as the best of bad ones: no other word sounds so.
    narrow = Settings(**PRESETS["fast"])
    assert sentence(flashlight.search(narrow, hot), twice) == "aah"
    assert sentence(flashlight.search(narrow, hot), once) != "aah"


def test_hot_words_with_no_pronunciation_given_are_said_by_rule(model):
    hot = {"bot": HotWord(4.0)}
    assert "bot" not in LEXICON
    search = model.search(Settings(), hot)
    assert sentence(search, spoken(["B", "AA", "T"])) == "bot"


@pytest.mark.slow
def test_a_search_takes_its_hot_words_with_it(flashlight):
    before = set(flashlight.trie.search([]).children)
    for _ in range(3):
        hot = {"zadie": HotWord(3.0, (ZADIE,)), "zoe": HotWord(4.0, (("Z", "OW"),))}
        search = flashlight.search(Settings(), hot)
        # Every time the same numbers: the last search has given them back.
        assert set(flashlight.trie.search([]).children) - before == {42}
        assert sentence(search, spoken(["Z", "OW"])) == "zoe"
        del search
        gc.collect()
        assert set(flashlight.trie.search([]).children) == before


def test_two_searches_have_the_same_word_with_their_own_weights(flashlight):
    logits = say(["the", "cat", "ate"])
    strong = flashlight.search(Settings(), {"eight": HotWord(20.0)})
    weak = flashlight.search(Settings(), {"eight": HotWord(0.01)})
    assert [sentence(one, logits) for one in (strong, weak)] == ["the cat eight", "the cat ate"]
    del strong
    gc.collect()
    assert sentence(weak, logits) == "the cat ate"


@pytest.mark.parametrize(
    ("hot", "reason"),
    [
        ({"zoe": HotWord(0.0, (("Z",),))}, "weight 0.0; needed a number above 0"),
        ({"zoe": HotWord(float("nan"), (("Z",),))}, "weight nan"),
        ({"zoe": HotWord(1.0, (("QQ",),))}, "said 'QQ'; needed 1-60 phonemes of AA"),
        ({"zoe": HotWord(1.0, ((),))}, "said ''"),
        ({"two words": HotWord(1.0)}, "is no single word"),
        ({"Jos\u00e9": HotWord(1.0), "jose": HotWord(2.0)}, "'jose' is given twice"),
        ({"zoe;": HotWord(1.0, (("Z",),))}, "is no single word"),
        ({"</s>": HotWord(1.0, (("Z",),))}, "is no single word"),
        ({"\ud800": HotWord(50.0, (("K",),))}, "is no single word"),
        ({"cat\x1b[2J": HotWord(1.0, (("K",),))}, "is no single word"),
        ({"c" * 101: HotWord(1.0, (("K",),))}, "needed 1 to 100 printable characters"),
        ({"zoe": HotWord(1.0, (("Z",),) * 2001)}, "2001 pronunciations; at most 2000"),
        ({"42": HotWord(1.0)}, "give its pronunciation"),
        ({f"zoe{n}": HotWord(1.0, (("Z",),)) for n in range(MAX_HOT_WORDS + 1)}, "at most"),
    ],
)
def test_hot_words_that_cannot_be_used_are_refused(model, hot, reason):
    with pytest.raises(HotWordError, match=reason):
        model.search(Settings(), hot)


def test_too_many_hot_words_of_all_clients_together_are_refused_and_leave_nothing(flashlight):
    def hot(client):
        return {f"zoe{client}_{n}": HotWord(1.0, (("Z",),)) for n in range(MAX_HOT_WORDS)}

    searches = [flashlight.search(Settings(), hot(client)) for client in range(4)]
    before = set(flashlight.trie.search([]).children)
    with pytest.raises(HotWordError, match="all clients together have too many"):
        flashlight.search(Settings(), {"one": HotWord(1.0, (("Z",),))})
    assert set(flashlight.trie.search([]).children) == before
    del searches
    gc.collect()
    flashlight.search(Settings(), {"one": HotWord(1.0, (("Z",),))})


def test_searches_that_want_the_same_words_share_them(flashlight):
    hot = {f"zoe{n}": HotWord(9.0 + n / 100, (ZADIE,)) for n in range(MAX_HOT_WORDS)}
    before = set(flashlight.trie.search([]).children)
    searches = [flashlight.search(Settings(), dict(hot)) for _ in range(12)]
    assert len(set(flashlight.trie.search([]).children) - before) == 1  # they begin alike
    assert {sentence(one, spoken(ZADIE)) for one in searches} == {f"zoe{MAX_HOT_WORDS - 1}"}
    del searches[1:]
    gc.collect()
    assert sentence(searches[0], spoken(ZADIE)) == f"zoe{MAX_HOT_WORDS - 1}"
    del searches
    gc.collect()
    assert set(flashlight.trie.search([]).children) == before


def test_there_is_no_search_of_another_name(model_folder):
    with pytest.raises(BackendError, match="no search 'fast'; known are flashlight"):
        load_model(model_folder, "fast")
