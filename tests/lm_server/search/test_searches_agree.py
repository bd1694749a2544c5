"""Every search finds what listing all paths finds, with the same scores."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from brute_force import decode, problems
from graph import write_graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_server.lm.reader import find_words
from lm_server.search.forced import forced
from lm_server.search.hot_words import HotWord
from lm_server.search.load import load_model
from lm_server.settings import Settings

EXACT = {"beam": 1000.0, "max_active": 10_000, "nbest": 10_000, "max_classes": 41}
FEW = settings(max_examples=15, suppress_health_check=list(HealthCheck))


@st.composite
def knobs(draw):
    """Settings whose search leaves nothing out."""
    return Settings(
        acoustic_scale=draw(st.floats(0.3, 2.0)),
        blank_penalty=draw(st.floats(0.5, 9.0)),
        silence_penalty=draw(st.sampled_from([0.0, 0.7, 2.5, 1000.0])),
        word_bonus=draw(st.sampled_from([-2.0, 0.0, 1.3])),
        **EXACT,
    )


def assert_same(got, expected, ordered=True):
    """The same sentences with the same scores; equal totals have no order."""
    by_words = {one.words: one for one in expected}
    assert {one.words for one in got} == set(by_words)
    for one in got:
        reference = by_words[one.words]
        assert one.acoustic == pytest.approx(reference.acoustic, abs=2e-3)
        assert one.ngram == pytest.approx(reference.ngram, abs=1e-4)
        assert one.bonus == pytest.approx(reference.bonus, abs=1e-6)
    totals = [by_words[one.words].total for one in got]
    assert not ordered or np.all(np.diff(totals) <= 2e-3)


@FEW
@given(problems(), knobs(), st.integers(1, 6))
def test_flashlight_agrees_with_listing_every_path(tmp_path_factory, problem, chosen, cut):
    model = load_model(problem.write(tmp_path_factory.mktemp("problem")))
    search = model.search(chosen)
    search.step(problem.logits[:cut])
    search.step(problem.logits[cut:])
    expected = decode(problem.logits, problem.lexicon, problem.ngram, chosen)
    assert_same(search.finish(), expected)
    # A known sentence has the same scores without a search, and none where no path spells it.
    known = find_words(model.folder, problem.lexicon)
    found = [
        forced(model, known, chosen, problem.logits, words)
        for length in range(4)
        for words in itertools.product(problem.lexicon, repeat=length)
    ]
    assert_same([one for one in found if one], [one for one in expected if len(one.words) < 4], ())


@FEW
@given(problems(), knobs(), st.data())
def test_flashlight_with_hot_words_agrees_with_listing_every_path(
    tmp_path_factory, problem, chosen, data
):
    known = data.draw(st.sampled_from(sorted(problem.lexicon)))
    phones = st.lists(st.sampled_from(["AH", "T", "Z"]), min_size=1, max_size=3).map(tuple)
    said = data.draw(st.lists(phones, min_size=1, max_size=2, unique=True).map(tuple))
    weights = {known: data.draw(st.floats(0.1, 8.0)), "zoe": data.draw(st.floats(0.1, 8.0))}
    hot = {known: HotWord(weights[known]), "zoe": HotWord(weights["zoe"], said)}
    model = load_model(problem.write(tmp_path_factory.mktemp("problem")))
    search, other = model.search(chosen, hot), model.search(chosen)
    for one in (search, other):
        one.step(problem.logits)
    lexicon = problem.lexicon | {"zoe": said}
    expected = decode(problem.logits, lexicon, problem.ngram, chosen, weights)
    assert_same(search.finish(), expected)
    # The other search of the same model knows nothing of them.
    assert_same(other.finish(), decode(problem.logits, problem.lexicon, problem.ngram, chosen))


@FEW
@given(problems(), knobs(), st.integers(1, 6))
def test_the_graph_search_finds_the_best_of_all_paths(tmp_path_factory, problem, chosen, cut):
    model = load_model(write_graph(problem, tmp_path_factory.mktemp("problem")), "wfst")
    search = model.search(chosen)
    search.step(problem.logits[:cut])
    search.step(problem.logits[cut:])
    (best,) = search.finish()
    plain = replace(chosen, silence_penalty=1000.0, word_bonus=0.0)
    expected = decode(problem.logits, problem.lexicon, problem.ngram, plain)
    reference = {one.words: one for one in expected}[best.words]
    assert best.acoustic == pytest.approx(reference.acoustic, abs=2e-3)
    assert best.ngram == pytest.approx(reference.ngram, abs=1e-3)
    assert reference.total == pytest.approx(expected[0].total, abs=2e-3)
    assert search.finish() == ()


@FEW
@given(problems(), knobs(), st.integers(1, 6), st.floats(0.1, 8.0))
def test_pyctcdecode_agrees_with_adding_up_every_path(
    tmp_path_factory, monkeypatch, problem, chosen, cut, weight
):
    monkeypatch.setattr("lm_server.search.pyctcdecode_stream._HISTORIES", 10_000)
    model = load_model(problem.write(tmp_path_factory.mktemp("problem")), "pyctcdecode")
    said, known = (("Z", "AH"),), sorted(problem.lexicon)[0]
    search = model.search(chosen, {"zoe": HotWord(weight, said), known: HotWord(weight)})
    search.step(problem.logits[:cut])
    search.step(problem.logits[cut:])
    lexicon, weights = problem.lexicon | {"zoe": said}, {"zoe": weight, known: weight}
    expected = decode(problem.logits, lexicon, problem.ngram, chosen, weights, add=True)
    got = search.finish()
    assert_same(got, expected)
