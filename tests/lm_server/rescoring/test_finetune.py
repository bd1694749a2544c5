"""A large language model learns from a person's sentences, on a tiny random one."""

import json
import re

import pytest
from small_model import TEXT
from test_causal_lm import make

from lm_server.__main__ import main
from lm_server.rescoring import finetune as module
from lm_server.rescoring.finetune import Course, finetune, read_sentences, split
from lm_server.rescoring.load import load_scorer
from lm_server.rescoring.scorer import RescoringError

COURSE = Course(epochs=2, rank=4, learning_rate=0.02, batch=4, held_out=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llm") / "llama", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "mine.txt"
    file.write_text(TEXT * 3)
    return file


def test_no_sentence_is_on_both_sides_however_often_it_is_said(text):
    sentences = [*read_sentences([text]).texts]
    assert len(sentences) == 3 * len(set(sentences))
    learned, held_out = split(sentences, 0.3)
    assert not set(learned) & set(held_out)
    assert {*learned, *held_out} == set(sentences)
    # What else is there does not move a sentence to the other side.
    assert set(split([*sentences, "something else", "a cat"], 0.3)[1]) >= set(held_out)
    with pytest.raises(RescoringError, match="1 are to learn from and 0 held out"):
        split(["the cat sat"], 0.001)


def test_it_learns_resumes_and_is_a_folder_like_any_other(folder, text, tmp_path, monkeypatch):
    mine = read_sentences([text])
    perplexities = finetune(folder, mine, tmp_path / "whole", COURSE, "cpu")
    assert min(perplexities[1:]) < 0.5 * perplexities[0]
    learn = module._learn

    def cut_off(model, optimiser, material, course, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        learn(model, optimiser, material, course, epoch)

    monkeypatch.setattr(module, "_learn", cut_off)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        finetune(folder, mine, out, COURSE, "cpu", inputs={"--text": "a"})
    assert not out.exists()
    monkeypatch.setattr(module, "_learn", learn)
    with pytest.raises(RescoringError, match=r"interrupted run with another --text"):
        finetune(folder, mine, out, COURSE, "cpu", inputs={"--text": "b"})
    assert finetune(folder, mine, out, COURSE, "cpu", inputs={"--text": "a"}) == perplexities
    assert not (tmp_path / "out.unfinished").exists()
    held_out = split(mine.texts, COURSE.held_out)[1]
    adapted, before = load_scorer(out, "cpu"), load_scorer(folder, "cpu")
    assert adapted.score(held_out).sum() > before.score(held_out).sum()
    assert json.loads((out / "rescoring.json").read_text())["text_form"] == "plain"


def test_a_model_that_gets_no_better_is_not_written(folder, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "_learn", lambda *given: None)
    out = tmp_path / "out"
    command = ["finetune-llm", "--text", str(text), "--out", str(out), "--held-out", "0.3"]
    assert main([*command, "--llm", str(folder), "--llm-device", "cpu"]) == 2
    assert re.search(r"error: no epoch .* nothing is written", capsys.readouterr().err)
    assert [*tmp_path.iterdir()] == []
    assert main(command) == 2
    assert "there is no model to adapt: add --llm DIR" in capsys.readouterr().err
