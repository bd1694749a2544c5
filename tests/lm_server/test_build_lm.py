"""`lm-server build` makes a whole model folder or none, and says what is wrong with its input."""

import json
import re
import signal
import subprocess
import sys

import kenlm
import pytest
from processes import ROOT, wait_until
from rich.console import Console
from small_model import LEXICON, TEXT

from lm_server import build_lm
from lm_server.__main__ import main
from lm_server.build_lm import build
from lm_server.lexicon import read_lexicon

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

    monkeypatch.setattr(build_lm, "write_trie", full)
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
    (tmp_path / "digits.txt").write_text("room 7\nroom 8\n")
    (tmp_path / "foreign.txt").write_text("quux quuz\n")
    (tmp_path / "broken.lex").write_text("a AH\nb QQ\n")
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
    for part in ("reading the text", "estimating", "writing the KenLM trie", "perplexity"):
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
        # Tests that run in the background of a shell inherit an ignored SIGINT; a user's has none.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Its folder appears first, and the work takes seconds.
    assert wait_until(lambda: len(list(tmp_path.iterdir())) > 1)
    process.send_signal(how)
    _, error = process.communicate(timeout=20)
    assert process.returncode == code, error
    assert b"Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
