"""Decoding from Python answers as the command does."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from small_model import say
from test_causal_lm import make
from test_offline import write

import lm_server
from lm_server.__main__ import main
from lm_server.hypothesis import Answer, Word
from lm_server.protocol import ProtocolError, to_lm_order, to_rnn_order
from lm_server.settings import PRESETS, Settings, SettingsError

SAID = ["the cat sat", "a dog ran"]


def trial(words):
    return to_rnn_order(say(words.split()))


@pytest.fixture(scope="module")
def decoder(model_folder):
    return lm_server.load(str(model_folder))


def commanded(model_folder, tmp_path, *options):
    """What `lm-server decode` writes for SAID."""
    write(tmp_path / "logits.npz", SAID)
    files = ["--logits", str(tmp_path / "logits.npz"), "--out", str(tmp_path / "out.jsonl")]
    assert main(["decode", "--lm", str(model_folder), *files, "--workers", "1", *options]) == 0
    lines = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line if name != "trial"} for line in lines]


def test_answers_are_those_of_the_command(decoder, model_folder, tmp_path):
    expected = commanded(model_folder, tmp_path)
    logits = np.load(tmp_path / "logits.npz")
    parts = np.split(logits["logits"], np.cumsum(logits["frames"])[:-1])
    answers = decoder.decode(parts)
    assert [one.as_json() for one in answers] == expected
    assert decoder.decode(parts[0]) == answers[0]
    assert [one.sentence for one in answers] == SAID
    assert [word.text for word in answers[0].words] == ["the", "cat", "sat"]
    assert all(0.0 < word.confidence <= 1.0 for word in answers[0].words)


def test_settings_and_a_large_model_are_those_of_the_command(model_folder, tmp_path):
    opt = make(tmp_path / "opt", "opt")
    options = ["--llm", str(opt), "--nbest", "3"]
    expected = commanded(model_folder, tmp_path, *options, "--llm-device", "cpu")
    decoder = lm_server.load(model_folder, settings={"nbest": 3}, llm=opt)
    answers = decoder.decode([trial(one) for one in SAID])
    assert [one.sentence for one in answers] == [one["sentence"] for one in expected]
    assert all(one.rescored for one in answers)
    changed = decoder.decode(trial(SAID[0]), context="a dog ran")
    assert changed.hypotheses[0].llm != answers[0].hypotheses[0].llm


def test_hot_words_hold_for_one_call(decoder):
    usual = decoder.decode(trial("the cat ate"))
    favoured = decoder.decode(trial("the cat ate"), hot_words={"eight": 20.0})
    assert (usual.sentence, favoured.sentence) == ("the cat ate", "the cat eight")
    assert decoder.decode(trial("the cat ate")) == usual


def test_a_streaming_search_gives_the_words_so_far(decoder):
    search = decoder.search()
    search.begin()
    frames = to_lm_order(trial("the cat sat"))
    words = [search.step(frame[None]) for frame in frames]
    assert words[-1][:2] == ("the", "cat")
    assert search.finish()[0].sentence == "the cat sat"


def test_logits_of_another_shape_are_refused(decoder):
    with pytest.raises(ProtocolError, match=r"needed \[frames, 41\]"):
        decoder.decode(np.zeros((3, 40), np.float32))
    with pytest.raises(ProtocolError, match=r"needed \[frames, 41\]"):
        decoder.decode(np.zeros(41, np.float32))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"beem": 3.0}, "no setting 'beem'"), ({"beam": -1.0}, "beam is -1"), ("no.json", "no.json")],
)
def test_settings_that_cannot_be_used_are_refused(model_folder, settings, reason):
    with pytest.raises(SettingsError, match=reason):
        lm_server.load(model_folder, settings=settings)


def test_an_empty_answer_has_no_words():
    assert (Answer(()).sentence, Answer(()).words) == ("", ())
    assert Word("a", None).confidence is None


def test_decoding_prints_no_warnings_and_the_client_is_light(model_folder, tmp_path):
    np.save(tmp_path / "logits.npy", trial("the cat"))
    program = (
        "import sys, numpy as np, lm_server\n"
        "assert not [one for one in sys.modules if one.startswith('lm_server.')]\n"
        "lm_server.Client\n"
        "assert 'lm_server.search' not in sys.modules\n"
        f"answer = lm_server.load({str(model_folder)!r}).decode(np.load({str(tmp_path)!r}"
        " + '/logits.npy'))\n"
        "print(answer.sentence)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("the cat\n", "")


def test_a_preset_stands_among_the_settings_by_name(model_folder):
    decoder = lm_server.load(model_folder, settings={"preset": "fast", "beam": 15})
    assert decoder.settings == dataclasses.replace(Settings(), **{**PRESETS["fast"], "beam": 15.0})
    with pytest.raises(SettingsError, match="needed one of accurate, balanced, fast"):
        lm_server.load(model_folder, settings={"preset": "slow"})
