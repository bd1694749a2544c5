"""Every published parameter has its meaning, or a message that says why it has none."""

import argparse
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from small_model import say

from lm_server.commands.options import add_search_options, settings_from
from lm_server.protocol import LM_CLASSES, SILENCE, ProtocolError
from lm_server.search.emissions import Emissions
from lm_server.search.load import (
    BACKENDS,
    backend,
    default_settings,
    load_model,
    without_effect,
)
from lm_server.serving.parameters import changed_settings, idle_settings, named
from lm_server.settings import PRESETS, Settings, SettingsError, write_settings

PUBLISHED = (
    *("max_active", "min_active", "beam", "lattice_beam", "acoustic_scale"),
    *("ctc_blank_skip_threshold", "length_penalty", "nbest", "blank_penalty", "alpha", "do_opt"),
    *("rescore", "top_candidates_to_augment", "score_penalty_percent"),
)
SIL = LM_CLASSES.index(SILENCE)


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)


def noisy(words, seed=0, spread=4.0):
    logits = say(words, strength=9.0)
    return (logits + np.random.default_rng(seed).normal(0, spread, logits.shape)).astype(np.float32)


def decoded(model, logits, **settings):
    search = model.search(Settings(**settings))
    search.step(logits)
    return search.finish()


@pytest.mark.parametrize("search", BACKENDS)
def test_a_published_parameter_is_a_setting_or_has_a_reason_why_not(search):
    known = {field.name for field in fields(Settings)}
    for name in PUBLISHED:
        reason = without_effect(name, search)
        assert name in known or reason
        if reason:
            assert reason.startswith(f"{name} has no effect in the search {search}: ")
    # What a search declares to lack or to have its own default of is a setting.
    declared = backend(search)
    assert {*declared.lacks, *declared.defaults} <= {*known, "preset"}


@pytest.mark.parametrize("lattice_beam", [0.0, 1.0, 4.0])
def test_lattice_beam_leaves_out_what_is_much_worse_than_the_best(model, lattice_beam):
    logits = noisy(["the", "cat", "sat"])
    everything = decoded(model, logits, beam=40.0)
    best = everything[0].total
    near = [one for one in everything if one.total >= best - lattice_beam]
    assert len(everything) > len(near) > 0
    assert list(decoded(model, logits, beam=40.0, lattice_beam=lattice_beam)) == near


def test_the_word_bonus_lengthens_or_shortens_sentences_and_is_in_the_total(model):
    logits = noisy(["the", "cat", "sat"], spread=5.0)
    lengths = []
    for bonus in (-12.0, 0.0, 12.0):
        best = decoded(model, logits, word_bonus=bonus, beam=60.0)[0]
        assert best.bonus == pytest.approx(bonus * len(best.words))
        lengths.append(len(best.words))
    assert lengths[0] < lengths[2]
    assert lengths == sorted(lengths)


def test_of_frames_that_are_surely_blank_only_the_first_of_a_run_is_searched():
    # The blank's probability: high, high, low, high, high, high.
    sure = np.array([1, 1, 0, 1, 1, 1], bool)
    logits = np.zeros((6, 41), np.float32)
    logits[sure, 0] = 12.0
    logits[2, 5] = 12.0
    plain = Settings(blank_penalty=3.0, acoustic_scale=0.7)
    every = Emissions(plain)
    every.begin(plain)
    rows = every.of(logits)
    assert len(rows) == 6
    skipping = replace(plain, ctc_blank_skip_threshold=0.9)
    some = Emissions(skipping)
    # In whatever chunks the frames come.
    for cuts in ([], [1], [2, 5], [1, 2, 3, 4, 5]):
        some.begin(skipping)
        got = np.concatenate([some.of(part) for part in np.split(logits, cuts)])
        np.testing.assert_array_equal(got, rows[[0, 2, 3]])
        assert some.skipped == pytest.approx(rows[[1, 4, 5], 0].sum())


def test_skipping_sure_blanks_changes_no_score_of_a_clear_sentence(model):
    logits = say(["the", "cat", "sat"], gap=5)
    plain = decoded(model, logits)[0]
    skipped = decoded(model, logits, ctc_blank_skip_threshold=0.9)[0]
    assert skipped.words == plain.words == ("the", "cat", "sat")
    assert skipped.acoustic == pytest.approx(plain.acoustic, rel=1e-4)
    assert skipped.ngram == plain.ngram


def without_silence(words, gap):
    """Logits in which no word has its silence."""
    parts = [say([word], gap=gap, last_silence=False) for word in words]
    return np.concatenate(parts)


def test_words_without_a_silence_between_them_are_understood(model):
    words = ("the", "cat", "ran")
    logits = without_silence(words, gap=1)
    found = decoded(model, logits)[0]
    assert found.words == words
    demanding = decoded(model, logits, beam=100.0, silence_penalty=1000.0, max_classes=41)[0]
    # Two silences cost twice 4 and what was the blank's cost anyway; else nearly all evidence.
    assert found.acoustic > demanding.acoustic + 30.0
    # Without a blank either, a phoneme's second frame must do.
    assert decoded(model, without_silence(words, gap=0), beam=60.0)[0].words == words


def test_a_silence_in_the_logits_costs_what_it_did():
    logits = np.zeros((2, 41), np.float32)
    logits[0, SIL] = 9.0
    logits[1, 0] = 9.0
    settings = Settings(acoustic_scale=0.5, blank_penalty=1.0, silence_penalty=2.0)
    emissions = Emissions(settings)
    emissions.begin(settings)
    rows = emissions.of(logits)
    norm = math.log(math.exp(9.0) + 40)
    assert rows[0, SIL] == pytest.approx(0.5 * (9.0 - norm))
    assert rows[1, SIL] == pytest.approx(0.5 * (9.0 - norm) - 2.0)
    assert rows[:, 0] == pytest.approx([0.5 * (0.0 - norm), 0.5 * (9.0 - norm)])


def test_each_search_has_its_own_defaults_and_options_change_them():
    parser = argparse.ArgumentParser()
    add_search_options(parser)
    chosen = settings_from(parser.parse_args(["--backend", "wfst", "--beam", "11"]))
    assert chosen == replace(default_settings("wfst"), beam=11.0)
    assert chosen.max_active == 7000
    assert settings_from(parser.parse_args([])) == Settings()


def test_a_file_keeps_its_width_until_a_preset_or_an_option_is_given(tmp_path):
    parser = argparse.ArgumentParser()
    add_search_options(parser)
    path = tmp_path / "tuned.json"
    write_settings(path, Settings(acoustic_scale=0.7, max_active=300, beam=20.0))

    def chosen(*options):
        return settings_from(parser.parse_args(["--settings", str(path), *options]))

    assert (chosen().max_active, chosen().beam) == (300, 20.0)
    fast = chosen("--preset", "fast", "--beam", "15")
    assert fast.acoustic_scale == 0.7
    assert {name: getattr(fast, name) for name in PRESETS["fast"]} == {
        **PRESETS["fast"],
        "beam": 15.0,
    }
    assert settings_from(parser.parse_args(["--preset", "accurate"])) == Settings()


@pytest.mark.parametrize("search", BACKENDS)
def test_a_preset_changes_flashlight_alone_and_the_others_have_a_reason(search, capsys):
    parser = argparse.ArgumentParser()
    add_search_options(parser)
    usual = default_settings(search)
    given = settings_from(parser.parse_args(["--backend", search, "--preset", "balanced"]))
    live = changed_settings(usual, {"preset": b"balanced"}, {}, search)
    assert live == given
    reasons = idle_settings(usual, live, {"preset": b"balanced"}, search)
    if search == "flashlight":
        assert given == replace(usual, **PRESETS["balanced"]) != usual
        assert not reasons
    else:
        assert given == usual
        assert reasons == [without_effect("preset", search)]
        assert reasons[0] in capsys.readouterr().err


def test_a_client_names_a_preset_and_what_differs_from_it_within_the_ceilings():
    fields = {"preset": b"fast", "beam": b"16"}
    assert changed_settings(Settings(), fields) == replace(
        Settings(), **{**PRESETS["fast"], "beam": 16.0}
    )
    assert named(fields) == set(PRESETS["fast"])
    with pytest.raises(ProtocolError, match=r"max_active is 500; this server allows at most 200"):
        changed_settings(Settings(max_active=100), {"preset": b"accurate"}, {"max_active": 200})
    with pytest.raises(SettingsError, match=r"preset is 'quick'; needed one of accurate, balanced"):
        changed_settings(Settings(), {"preset": b"quick"})


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        (["--min-active", "3"], ["min-active"]),
        (["--backend", "wfst", "--word-bonus", "2", "--nbest", "5"], ["nbest", "word-bonus"]),
        (
            ["--alpha", "0.3", "--do-opt", "1", "--llm-device", "cpu"],
            ["do-opt", "alpha", "llm-device"],
        ),
        (["--alpha", "0.3", "--llm", "folder"], []),
        (["--beam", "9"], []),
    ],
)
def test_each_option_without_effect_has_a_warning(capsys, given, warned):
    parser = argparse.ArgumentParser()
    add_search_options(parser)
    settings_from(parser.parse_args(given))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"--{name}" for name in warned]
