"""`lm-server decode` with the logits of several systems."""

import json

import numpy as np
import pytest
from small_model import say

from lm_server import offline
from lm_server.__main__ import main
from lm_server.protocol import to_rnn_order
from lm_server.rescoring.consensus import minimum_bayes_risk, rover

SAID = {
    "one": ["the cat sat", "the bat sat", "the bat sat"],
    "two": ["a dog ran", "a dog ran", "the dog ran to"],
    "three": ["the bat ate", "the cat ate a hat", "the cat had a hat"],
    "four": ["on the mat", "", "on the mat"],
}
"""Trials, and what each of three systems hears."""


@pytest.fixture
def files(tmp_path):
    """Three files. The last has the trials in another order."""
    rng = np.random.default_rng(0)
    for number, name in enumerate("abc"):
        logits = {trial: said(texts[number], rng) for trial, texts in SAID.items()}
        write(tmp_path / f"{name}.npz", logits, reverse=name == "c")
    return [str(tmp_path / f"{name}.npz") for name in "abc"]


def said(text, rng):
    """Frames that leave some doubt, as many for each sentence."""
    frames = np.zeros((36, 41), np.float32)
    frames[:, 0] = 6.0
    spelled = say(text.split(), frames=1, strength=6.0)
    frames[: len(spelled)] = spelled
    return to_rnn_order(frames + rng.normal(0.0, 0.7, frames.shape).astype(np.float32))


def write(path, logits, reverse=False, **more):
    names = sorted(logits, reverse=reverse)
    parts = [logits[name] for name in names]
    frames = np.array([len(one) for one in parts])
    np.savez(path, logits=np.concatenate(parts), frames=frames, trial=np.array(names), **more)


def logits_of(path):
    with np.load(path) as file:
        parts = np.split(file["logits"], np.cumsum(file["frames"])[:-1])
        return dict(zip(file["trial"].tolist(), parts, strict=True))


def decode(model_folder, out, *options):
    return main(
        ["decode", "--lm", str(model_folder), "--out", str(out), "--workers", "1", *options]
    )


def lines(path):
    return {one["trial"]: one for one in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize("method", ["mbr", pytest.param("rover", marks=pytest.mark.slow)])
def test_several_systems_answer_by_the_consensus_of_what_each_answers_alone(
    model_folder, files, tmp_path, method
):
    alone = []
    for number, file in enumerate(files):
        assert decode(model_folder, tmp_path / str(number), "--logits", file) == 0
        alone.append(lines(tmp_path / str(number)))
    out = tmp_path / "together"
    assert decode(model_folder, out, "--logits", *files, "--combine", method) == 0
    found = lines(out)
    assert list(found) == sorted(SAID)
    for trial, line in found.items():
        lists = [[(h["sentence"], h["total"]) for h in one[trial]["nbest"]] for one in alone]
        expected = (minimum_bayes_risk if method == "mbr" else rover)(lists)
        assert line["sentence"] == expected.candidates[0].sentence
        assert line["confidence"] == pytest.approx(expected.candidates[0].share)
        assert [h["total"] for h in line["nbest"]] == pytest.approx(
            [-one.expected_errors for one in expected.candidates]
        )
    assert any(found[trial]["sentence"] != alone[0][trial]["sentence"] for trial in SAID)


def test_averaged_logits_are_decoded_as_a_file_of_their_mean(model_folder, files, tmp_path):
    every = [logits_of(file) for file in files]
    normalised = [
        {trial: x - np.log(np.exp(x).sum(1, keepdims=True)) for trial, x in one.items()}
        for one in every
    ]
    mean = {trial: sum(one[trial] for one in normalised) / 3 for trial in SAID}
    write(tmp_path / "mean.npz", {trial: x.astype(np.float32) for trial, x in mean.items()})
    assert decode(model_folder, tmp_path / "mean", "--logits", str(tmp_path / "mean.npz")) == 0
    out = tmp_path / "together"
    assert decode(model_folder, out, "--logits", *files, "--combine", "logits") == 0
    for found, expected in zip(
        *(lines(one).values() for one in (out, tmp_path / "mean")), strict=True
    ):
        assert [h["sentence"] for h in found["nbest"]] == [h["sentence"] for h in expected["nbest"]]
        assert found["confidence"] == pytest.approx(expected["confidence"], abs=1e-3)


def test_files_that_do_not_fit_are_refused(model_folder, files, tmp_path, capsys):
    first, second, _ = files
    logits = logits_of(second)

    def refused(changed, *options):
        write(tmp_path / "b.npz", changed)
        out = tmp_path / "out"
        assert decode(model_folder, out, "--logits", first, second, *options) == 2
        assert not out.exists()
        return capsys.readouterr().err

    more = {**logits, "zero": logits["one"]}
    assert f"{second} has 1 trials that {first} lacks, the first is zero" in refused(more)
    fewer = {trial: logits[trial] for trial in ("one", "two", "three")}
    assert f"{first} has 1 trials that {second} lacks, the first is four" in refused(fewer)
    shorter = {**logits, "three": logits["three"][:-3]}
    error = refused(shorter, "--combine", "logits")
    assert f"trial three has 36 frames in {first} and 33 in {second}" in error
    assert decode(model_folder, tmp_path / "out", "--logits", first, first) == 2
    assert f"--logits names {first} twice" in capsys.readouterr().err


def test_a_trial_that_one_system_cannot_decode_is_answered_by_the_others_and_named(
    model_folder, files, tmp_path, capsys
):
    logits = logits_of(files[1])
    logits["four"][4, 7] = np.nan
    write(tmp_path / "b.npz", logits)
    out = tmp_path / "out"
    assert decode(model_folder, out, "--logits", *files) == 1
    assert f"trial four of {files[1]}: logits hold 1 NaN" in capsys.readouterr().err
    found = lines(out)
    assert found["four"]["sentence"] == "on the mat"
    assert "logits hold 1 NaN" in found["four"]["problem"]
    assert [one["problem"] for trial, one in found.items() if trial != "four"] == [None] * 3


def test_an_interrupted_run_of_several_systems_goes_on_with_the_same_ones(
    model_folder, files, tmp_path, capsys, monkeypatch
):
    whole = tmp_path / "whole"
    assert decode(model_folder, whole, "--logits", *files) == 0
    searched, search = [], offline.decode_trial

    def ended_in_the_third_trial(*arguments):
        if len(searched) == 7:
            raise KeyboardInterrupt
        searched.append(arguments[1])
        return search(*arguments)

    monkeypatch.setattr(offline, "decode_trial", ended_in_the_third_trial)
    out = tmp_path / "out"
    assert decode(model_folder, out, "--logits", *files) == 130
    monkeypatch.setattr(offline, "decode_trial", lambda *a: searched.append(a[1]) or search(*a))
    assert decode(model_folder, out, "--logits", *files, "--combine", "rover") == 2
    assert "an interrupted run with another --combine" in capsys.readouterr().err
    searched.clear()
    assert decode(model_folder, out, "--logits", *files) == 0
    assert "resuming: 2 of 4 trials" in capsys.readouterr().err
    assert len(searched) == 6
    assert out.read_text() == whole.read_text()
