"""Interpolated models are what they should be, and a person's words are decoded at once."""

import itertools
import json

import kenlm
import numpy as np
import pytest
from rich.console import Console
from small_model import LEXICON, say
from test_kneser_ney import MEGABYTE, encode, zipf_text

from lm_server.__main__ import main
from lm_server.lm.adapt import Sources, adapt
from lm_server.lm.estimate.kneser_ney import estimate
from lm_server.lm.interpolate import best_weights, interpolate
from lm_server.lm.reader import read_description, read_spellings
from lm_server.lm.sorted_ngrams import BEGIN
from lm_server.lm.trie.kenlm_binary import read_trie, write_trie
from lm_server.protocol import LM_CLASSES, SILENCE
from lm_server.search.flashlight import BeamSearch, LanguageModel
from lm_server.settings import Settings

QUIET = Console(quiet=True)


def estimated(folder, text, order, vocabulary=None):
    folder.mkdir()
    tokens, words = encode(text)
    return estimate(tokens, words, order, MEGABYTE, folder, vocabulary=vocabulary).model


def kenlm_of(path, model):
    write_trie(path, model)
    return kenlm.Model(str(path))


@pytest.mark.parametrize("orders", [(3, 2), (1, 3)])
def test_an_n_gram_of_either_model_has_the_weighted_mean_of_their_probabilities(tmp_path, orders):
    texts = [zipf_text(1, 300), [["new", *words] for words in zipf_text(2, 40)]]
    both = [
        estimated(tmp_path / str(i), text, n)
        for i, (text, n) in enumerate(zip(texts, orders, strict=True))
    ]
    mixed = interpolate(both, [0.7, 0.3])
    readers = [kenlm_of(tmp_path / f"{i}.bin", one) for i, one in enumerate([*both, mixed])]
    checked = 0
    for words in [*texts[0][:60], *texts[1][:20]]:
        scores = [list(one.full_scores(" ".join(words))) for one in readers]
        for place, (first, second, (found, length, _)) in enumerate(zip(*scores, strict=True)):
            if length < min(place + 2, 3):
                continue  # it backs off
            p = 0.7 * 10 ** first[0] + 0.3 * 10 ** second[0]
            assert found == pytest.approx(np.log10(p), abs=2e-4)
            checked += 1
    assert checked > 150


def test_the_interpolated_model_is_a_distribution_after_every_history(tmp_path):
    texts = zipf_text(1, 200), zipf_text(2, 60)
    union = {word for text in texts for words in text for word in words} | {"<unk>", "</s>"}
    both = [estimated(tmp_path / str(i), text, 3, len(union)) for i, text in enumerate(texts)]
    mixed = interpolate(both, [0.4, 0.6])
    reader = kenlm_of(tmp_path / "mixed.bin", mixed)
    everything = [word for word in mixed.words if word != BEGIN]
    for history in itertools.chain([()], [(word,) for word in everything[1:9]], [("<s>",)]):
        state = kenlm.State()
        reader.NullContextWrite(state)
        for word in history:
            after = kenlm.State()
            reader.BaseScore(state, word, after)
            state = after
        total = sum(10 ** reader.BaseScore(state, word, kenlm.State()) for word in everything)
        assert total == pytest.approx(1.0, abs=1e-4)


def test_the_weights_have_the_least_perplexity():
    generator = np.random.default_rng(0)
    log10 = np.log10(generator.uniform(0.001, 0.3, (4000, 2)) * [1.0, 0.6])
    found = best_weights(log10)
    grid = np.linspace(0, 1, 1001)
    costs = [-np.log10((10.0**log10) @ [w, 1 - w]).mean() for w in grid]
    assert found[0] == pytest.approx(grid[int(np.argmin(costs))], abs=0.003)
    assert found.sum() == pytest.approx(1.0)


def logits_of(*pronunciations):
    rows = []
    for name in [name for said in pronunciations for name in [*said.split(), SILENCE]]:
        rows += [LM_CLASSES.index(name)] * 2 + [0]
    logits = np.zeros((len(rows), len(LM_CLASSES)), np.float32)
    logits[np.arange(len(rows)), rows] = 25.0
    return logits


def decoded(folder, logits):
    search = BeamSearch(LanguageModel(folder), Settings())
    search.step(logits)
    return search.finish()[0].sentence


def test_a_persons_sentences_and_names_are_decoded_after_it(model_folder, tmp_path, capsys):
    said = tmp_path / "mine.txt"
    said.write_text("Zadie sat on the sofa.\nThe sofa was Zadie's.\nTwo cats ate.\n" * 4)
    names = tmp_path / "names.txt"
    names.write_text("# of my family\nxavi SH AA V IY\ncat\n")
    out = tmp_path / "adapted"
    command = ["adapt", "--lm", str(model_folder), "--text", str(said), "--out", str(out)]
    assert main([*command, "--vocabulary-add", str(names), "brezhnevitz"]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "4 words of the text are added with guessed pronunciations: cats, sofa, zadie" in error
    assert "weights: lm 0." in error
    assert "before," in error
    assert decoded(out, logits_of("SH AA V IY", "S AE T")) == "xavi sat"
    assert decoded(out, say(["the", "cat", "sat"])) == "the cat sat"
    words = read_spellings(out, read_description(out)).words
    assert {"brezhnevitz", "zadie's", "sofa", "zebra"} <= set(words)
    described = json.loads((out / "lm.json").read_text())
    assert described["added_words"] == 7
    assert sum(described["weights"]) == pytest.approx(1.0, abs=1e-3)
    before, after = (read_trie(path / "lm.bin") for path in (model_folder, out))
    assert set(before.words) < set(after.words)
    assert len(LEXICON.splitlines()) < described["pronunciations"]


def test_the_adapted_model_is_less_perplexed_by_what_the_person_says(model_folder, tmp_path):
    said, held_out = tmp_path / "mine.txt", tmp_path / "later.txt"
    said.write_text("the bat had a cat\nthe bat had a dog\na bat had the hat\n" * 5)
    held_out.write_text("the bat had a hat\na bat had a cat\nthe dog ran\n")
    sources = Sources([model_folder], [said], held_out=[held_out])
    adapt(sources, tmp_path / "lm", QUIET)
    adapt(Sources([model_folder], [said], (), [held_out], [1.0, 0.0]), tmp_path / "same", QUIET)
    figures = [read_description(tmp_path / name) for name in ("lm", "same")]
    assert figures[0]["perplexity"] < 0.6 * figures[1]["perplexity"]
    old, new = (kenlm.Model(str(path / "lm.bin")) for path in (model_folder, tmp_path / "same"))
    for text in ("the cat sat on the mat", "zebra ran"):
        assert new.score(text) == pytest.approx(old.score(text), abs=1e-3)


def test_an_arpa_and_a_model_folder_are_mixed_in_the_form_of_the_first(model_folder, tmp_path):
    arpa = tmp_path / "small.arpa"
    arpa.write_text(
        "\\data\\\nngram 1=5\nngram 2=1\n\n\\1-grams:\n-1\t<unk>\n-99\t<s>\t-0.1\n-0.5\t</s>\n"
        "-0.4\tQuokka\t-0.2\n-0.6\tzebra\n\n\\2-grams:\n-0.3\tQuokka </s>\n\n\\end\\\n"
    )
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("quokka\nthe cat sat\nzebra\n")
    command = ["adapt", "--lm", str(model_folder), "--with", str(arpa)]
    assert main([*command, "--out", str(tmp_path / "x")]) == 2
    assert main([*command, "--held-out", str(held_out), "--out", str(tmp_path / "lm")]) == 0
    description = read_description(tmp_path / "lm")
    assert description["order"] == 3
    assert "quokka" in read_spellings(tmp_path / "lm", description).words
    assert description["perplexity"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is nothing to add to the model: needed --with, --text or --vocabulary-add"),
        (["--vocabulary-add", "r2d2"], "'r2d2' is no word whose pronunciation can be guessed"),
        (["--text", "{text}", "--weights", "0.5"], "the weights are 0.5; needed 2"),
        (["--text", "{text}", "--weights", "0.5", "0.9"], "the weights are 0.5 0.9; needed 2"),
        (["--with", "{lm}"], "no text to choose their weights on: needed --held-out"),
        (["--text", "{empty}"], "no sentence of"),
    ],
)
def test_what_cannot_be_adapted_is_refused(model_folder, tmp_path, capsys, options, message):
    (tmp_path / "text").write_text("the cat sat\n")
    (tmp_path / "empty").write_text("...\n")
    places = {"lm": model_folder, "text": tmp_path / "text", "empty": tmp_path / "empty"}
    command = ["adapt", "--lm", str(model_folder), "--out", str(tmp_path / "out")]
    assert main([*command, *(one.format(**places) for one in options)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
