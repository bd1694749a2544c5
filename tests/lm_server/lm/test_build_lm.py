"""`lm-server build` makes a whole model folder or none, and says what is wrong with its input."""

import gzip
import json
import os
import platform
import re
import signal
import subprocess
import sys

import kenlm
import pytest
from processes import ROOT, wait_until
from rich.console import Console
from small_model import LEXICON, TEXT

from lm_server.__main__ import main
from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm import folder as folder_module
from lm_server.lm.build import build

QUIET = Console(quiet=True)


def test_the_folder_holds_model_lexicon_and_figures(model_folder, lexicon_file):
    assert sorted(path.name for path in model_folder.iterdir()) == [
        "lexicon.txt",
        "lm.bin",
        "lm.json",
    ]
    figures = json.loads((model_folder / "lm.json").read_text())
    words = len({line.split()[0] for line in LEXICON.splitlines()})
    assert figures["order"] == 3
    assert figures["words"] == words
    assert figures["sentences"] == 30 * TEXT.count(".") + 30 * TEXT.count("!")
    assert 1 < figures["perplexity"] < words
    assert figures["held_out_sentences"] == figures["sentences"] // 100
    # "hats" alone is outside the lexicon; the figure is that of the text without what was held out.
    assert figures["outside_lexicon_rate"] == pytest.approx(30 / figures["running_words"], rel=0.1)
    assert figures["bytes"] == (model_folder / "lm.bin").stat().st_size
    assert read_lexicon(model_folder / "lexicon.txt").entries == read_lexicon(lexicon_file).entries


def test_likelier_words_come_first_in_the_lexicon(model_folder):
    order = list(read_lexicon(model_folder / "lexicon.txt").entries)
    assert order.index("the") < order.index("bat") < order.index("zebra")


@pytest.mark.parametrize("order", [1, 2, 5])
def test_every_order_is_built_and_every_lexicon_word_has_a_probability(
    tmp_path, text_file, lexicon_file, order
):
    build([text_file], order, lexicon_file, tmp_path / "lm", QUIET)
    model = kenlm.Model(str(tmp_path / "lm" / "lm.bin"))
    assert model.order == max(order, 2)
    assert json.loads((tmp_path / "lm" / "lm.json").read_text())["order"] == order
    for word in read_lexicon(lexicon_file).entries:
        assert -12 < model.score(word) < 0
    # Seen words are likelier than unseen ones.
    assert model.score("the") > model.score("zebra")


def test_a_second_build_replaces_the_first_and_leaves_nothing_behind(
    tmp_path, text_file, lexicon_file
):
    out = tmp_path / "lm"
    build([text_file], 1, lexicon_file, out, QUIET)
    build([text_file], 2, lexicon_file, out, QUIET)
    assert json.loads((out / "lm.json").read_text())["order"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


def test_building_twice_gives_the_same_files(tmp_path, text_file, lexicon_file):
    for name in ("one", "two"):
        build([text_file], 3, lexicon_file, tmp_path / name, QUIET)
    for file in ("lm.bin", "lexicon.txt", "lm.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_failed_build_leaves_the_old_model(tmp_path, text_file, lexicon_file, monkeypatch):
    out = tmp_path / "lm"
    build([text_file], 1, lexicon_file, out, QUIET)
    before = (out / "lm.json").read_bytes()

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(folder_module, "write_trie", full)
    with pytest.raises(OSError, match="disk full"):
        build([text_file], 2, lexicon_file, out, QUIET)
    assert (out / "lm.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


def test_a_folder_with_other_things_is_not_replaced(tmp_path, text_file, lexicon_file, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    arguments = ["--lexicon", str(lexicon_file), "--order", "1", "--out", str(tmp_path / "thesis")]
    assert main(["build", "--text", str(text_file), *arguments]) == 2
    assert "is no model folder" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"--text": "absent.txt"}, "there is no text file absent.txt"),
        ({"--text": "empty.txt"}, "no sentence of .*empty.txt can be used"),
        ({"--text": "digits.txt"}, "2 dropped for digits"),
        ({"--text": "foreign.txt"}, "none has a word of the lexicon"),
        ({"--prune": "1"}, "the cut-offs are 1 for a model of order 2; needed"),
        ({"--quantise": "40"}, "quantised to 40 bits; needed 2-25"),
        ({"--size": "0.3K"}, "words alone need .* but 300 are allowed"),
        ({"--memory": "1K"}, "the memory is 1000 bytes; needed at least"),
        ({"--vocabulary": "-1"}, "the vocabulary is -1 words"),
        ({"--held-out": "absent.txt"}, "there is no text file absent.txt"),
        ({"--held-out": "empty.txt"}, "held-out text empty.txt can be used: 0 dropped"),
        (
            {"--held-out": "digits.txt"},
            "held-out text digits.txt can be used: 2 dropped",
        ),
        ({"--text": "hollow"}, "the folder hollow holds no text"),
        ({"--order": "0"}, "the order is 0; needed 1-5"),
        ({"--order": "6"}, "the order is 6; needed 1-5"),
        ({"--lexicon": "absent.lex"}, "there is no lexicon file absent.lex"),
        ({"--lexicon": "broken.lex"}, "broken.lex, line 2: .*unknown phoneme 'QQ'"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_its_reason(
    tmp_path, monkeypatch, capsys, text_file, lexicon_file, changes, reason
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "digits.txt").write_text("room 7a\nroom 8b\n")
    (tmp_path / "foreign.txt").write_text("quux quuz\n")
    (tmp_path / "broken.lex").write_text("a AH\nb QQ\n")
    (tmp_path / "hollow").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    options = {
        "--text": str(text_file),
        "--lexicon": str(lexicon_file),
        "--order": "2",
        "--out": "lm",
    }
    arguments = [text for pair in (options | changes).items() for text in pair]
    assert main(["build", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: .*{reason}", " ".join(error.split())), error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_folders_are_read_with_all_that_is_below_them(tmp_path, lexicon_file):
    (tmp_path / "text" / "more").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text(TEXT * 20)
    (tmp_path / "text" / "more" / "b.gz").write_bytes(gzip.compress(TEXT.encode() * 20))
    (tmp_path / "text" / "notes.md").write_text("zebra zebra zebra")
    build([tmp_path / "text"], 2, lexicon_file, tmp_path / "lm", QUIET)
    figures = json.loads((tmp_path / "lm" / "lm.json").read_text())
    assert figures["texts"] == ["a.txt", "b.gz"]
    assert figures["sentences"] == 40 * (TEXT.count(".") + TEXT.count("!"))


def test_every_way_to_a_smaller_model_makes_it_smaller_and_usable(
    tmp_path, text_file, lexicon_file
):
    ways = {
        "whole": [],
        "cut": ["--prune", "0", "0", "30"],
        "few": ["--ngrams", "20"],
        "sized": ["--size", "1.2K"],
        "bits": ["--quantise", "4"],
        "small": ["--quantise", "4", "--compress", "--vocabulary", "9"],
    }
    size, held_out = {}, tmp_path / "held_out.txt"
    held_out.write_text("the cat sat on the hat\nthe zebra ran\n")
    for name, options in ways.items():
        arguments = ["--text", str(text_file), "--lexicon", str(lexicon_file), "--order", "3"]
        arguments += ["--held-out", str(held_out), "--memory", "20M", *options]
        assert main(["build", *arguments, "--out", str(tmp_path / name)]) == 0
        size[name] = (tmp_path / name / "lm.bin").stat().st_size
        figures = json.loads((tmp_path / name / "lm.json").read_text())
        assert figures["bytes"] == size[name]
        assert figures["held_out_sentences"] == 2
        assert 1 < figures["perplexity"] < 60
        model = kenlm.Model(str(tmp_path / name / "lm.bin"))
        assert model.score("the cat sat") > model.score("sat cat the")
        if name == "small":
            assert figures["words"] == 9
            assert figures["oov_rate"] > 0
        else:
            assert figures["words_in_text"] == figures["words"] - 2  # No zebra, no eight.
            assert figures["oov_rate"] == 0
    few = json.loads((tmp_path / "few" / "lm.json").read_text())
    assert sum(few["ngrams"][1:]) <= 20 < sum(few["ngrams_before_entropy_pruning"][1:])
    assert size["sized"] <= 1200
    for name in ("cut", "few", "sized", "small"):
        assert size[name] < size["whole"], name
    # Of so small a model the tables of bins take more than they save; not of a real one.
    assert size["small"] < size["bits"]


def test_words_that_the_lexicon_lacks_are_guessed_on_request(tmp_path, lexicon_file):
    (tmp_path / "text.txt").write_text("the cat sat on the glorp\n" * 200)
    arguments = ["--text", str(tmp_path / "text.txt"), "--lexicon", str(lexicon_file)]
    out = ["--out", str(tmp_path / "lm")]
    assert main(["build", *arguments, *out]) == 0
    assert "glorp" not in read_lexicon(tmp_path / "lm" / "lexicon.txt")
    assert main(["build", *arguments, "--g2p", *out]) == 0
    assert read_lexicon(tmp_path / "lm" / "lexicon.txt").entries["glorp"]
    assert json.loads((tmp_path / "lm" / "lm.json").read_text())["guessed_pronunciations"] == 1
    (tmp_path / "words.txt").write_text("the\nglorp\n")
    listed = ["--vocabulary", str(tmp_path / "words.txt")]
    assert main(["build", *arguments, *listed, "--g2p", *out]) == 0
    assert set(read_lexicon(tmp_path / "lm" / "lexicon.txt").entries) == {"the", "glorp"}


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path, text_file, lexicon_file):
    build([text_file], 1, lexicon_file, tmp_path / "lm", QUIET)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for number in (dead.pid, os.getpid()):
        (tmp_path / f".lm.{platform.node()}.{number}.abc").mkdir()
    build([text_file], 1, lexicon_file, tmp_path / "lm", QUIET)
    # That of a process which still works stays.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".lm.{platform.node()}.{os.getpid()}.abc",
        "lm",
    ]


@pytest.mark.parametrize("order", [1, 3])
def test_words_that_the_text_lacks_share_what_seen_words_leave(tmp_path, order):
    lexicon = tmp_path / "lexicon.txt"
    unseen = [f"z{letter}{other}" for letter in "abcdefgh" for other in "klmnop"]
    lexicon.write_text(LEXICON + "".join(f"{word} Z AH\n" for word in unseen))
    (tmp_path / "text.txt").write_text(TEXT * 30)
    build([tmp_path / "text.txt"], order, lexicon, tmp_path / "lm", QUIET)
    model = kenlm.Model(str(tmp_path / "lm" / "lm.bin"))
    words = [*read_lexicon(lexicon).entries, "</s>"]
    assert {model.score(word, bos=False, eos=False) for word in unseen} == {
        model.score("<unk>", bos=False, eos=False)
    }
    for history in ("", "the ", "the cat ", "zak "):
        state, after = kenlm.State(), kenlm.State()
        model.NullContextWrite(state)
        for word in history.split():
            model.BaseScore(state, word, after)
            state, after = after, kenlm.State()
        total = sum(10.0 ** model.BaseScore(state, word, kenlm.State()) for word in words)
        assert total == pytest.approx(1.0, abs=1e-4), history


def test_the_command_shows_its_progress_and_the_model_s_figures(tmp_path, text_file, lexicon_file):
    arguments = ["--order", "2", "--lexicon", str(lexicon_file), "--out", str(tmp_path / "lm")]
    done = subprocess.run(
        [sys.executable, "-m", "lm_server", "build", "--text", str(text_file), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stderr.split())
    for part in (
        "reading the text",
        "estimating",
        "writing the KenLM trie",
        "perplexity",
        "too small",
    ):
        assert part in shown
    assert done.stdout == ""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_build_that_is_stopped_leaves_nothing_behind(tmp_path, how, code):
    (tmp_path / "text.txt").write_text(TEXT * 2000)
    arguments = ["--order", "5", "--out", str(tmp_path / "lm")]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lm_server", "build"),
            *("--text", str(tmp_path / "text.txt"), *arguments),
        ],
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    # Its folder appears first, and the work takes seconds.
    assert wait_until(lambda: len(list(tmp_path.iterdir())) > 1)
    process.send_signal(how)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    assert b"Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_what_is_left_out_of_the_text_is_counted_and_said(tmp_path, lexicon_file, capsys):
    lines = "the cat sat on 2 mats\n" * 30 + "[noise] room 7a\n\u4f60\u597d\nroom 911\n"
    (tmp_path / "text.txt").write_text(lines)
    (tmp_path / "other.txt").write_text("the cat sat\nroom 7b\n")
    arguments = ["--text", str(tmp_path / "text.txt"), "--lexicon", str(lexicon_file)]
    arguments += ["--order", "1", "--held-out", str(tmp_path / "other.txt")]
    assert main(["build", *arguments, "--out", str(tmp_path / "lm")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    for part in (
        "of the text 3 of 33 sentences are left out: 2 for numbers with several readings, 1 for "
        "letters other than a-z (such as 7a, \u4f60\u597d, 911): write",
        "of the text 1 annotations in brackets are left out",
        "of the held-out text 1 of 2 sentences are left out: 1 for numbers",
        "warning: 17% of the text's words are outside the vocabulary, most often mats: they",
    ):
        assert part in said, said
    figures = json.loads((tmp_path / "lm" / "lm.json").read_text())
    assert (figures["dropped_with_digits"], figures["held_out_sentences"]) == (2, 1)


def test_unknown_words_of_the_text_are_no_words_of_the_model(tmp_path, lexicon_file):
    (tmp_path / "text.txt").write_text("<s> the <unk> sat </s>\n" * 40)
    arguments = ["--text", str(tmp_path / "text.txt"), "--lexicon", str(lexicon_file), "--g2p"]
    for extra in ([], ["--vocabulary", "5"]):
        assert main(["build", *arguments, *extra, "--out", str(tmp_path / "lm")]) == 0
        assert {"s", "unk"}.isdisjoint(read_lexicon(tmp_path / "lm" / "lexicon.txt").entries)
        figures = json.loads((tmp_path / "lm" / "lm.json").read_text())
        assert figures["words_without_pronunciation"] == 0
        assert figures["outside_lexicon_rate"] == pytest.approx(1 / 3)
