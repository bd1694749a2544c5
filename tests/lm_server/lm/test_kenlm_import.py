"""A KenLM file is used where it lies, with the lexicon and the tokens of phoneme-to-words-lm."""

import json
import shutil

import kenlm
import numpy as np
import pytest
from rich.console import Console
from small_model import LEXICON, say

from lm_server.__main__ import main
from lm_server.lexicon.pronunciations import LexiconError
from lm_server.lm.adapt import Sources, adapt
from lm_server.lm.build import build
from lm_server.lm.kenlm_import import read_tokens
from lm_server.lm.reader import read_description
from lm_server.protocol import PHONEMES
from lm_server.search.flashlight import BeamSearch, LanguageModel
from lm_server.settings import Settings

TOKENS = ("BLANK", "SIL", *PHONEMES)


@pytest.fixture
def laboratory(model_folder, tmp_path):
    """Files as the laboratory's package has them: lm.bin, lexicon.txt, tokens.txt."""
    folder = tmp_path / "hub"
    folder.mkdir()
    shutil.copy(model_folder / "lm.bin", folder / "lm.bin")
    lines = [line.split(" ", 1) for line in LEXICON.splitlines()]
    text = "".join(f"{word}\t{said} SIL\n" for word, said in lines)
    (folder / "lexicon.txt").write_text(text + "R2D2\tAA R SIL\nnyet\tN Y E T SIL\n")
    (folder / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    return folder


def imported(laboratory, out, *options):
    command = ["import", "--kenlm", str(laboratory / "lm.bin")]
    files = ["--lexicon", str(laboratory / "lexicon.txt"), "--tokens"]
    return main([*command, *files, str(laboratory / "tokens.txt"), "--out", str(out), *options])


def best(folder, words):
    search = BeamSearch(LanguageModel(folder), Settings())
    search.step(say(words))
    return search.finish()


def test_the_file_is_linked_not_copied_and_searched_as_if_it_were_ours(
    laboratory, model_folder, tmp_path, capsys
):
    said = tmp_path / "said.txt"
    said.write_text("the cat sat\na dog ran\n")
    assert imported(laboratory, tmp_path / "lm", "--held-out", str(said)) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "dropped 1 words (lexicon entries with unknown phonemes): nyet" in error
    assert "dropped 1 words (no words of a-z, apostrophe and hyphen): r2d2" in error
    link = tmp_path / "lm" / "lm.bin"
    assert link.is_symlink()
    assert link.resolve() == (laboratory / "lm.bin").resolve()
    description = json.loads((tmp_path / "lm" / "lm.json").read_text())
    assert "crc32" not in description
    assert description["perplexity"] > 1
    assert description["order"] == 3
    ours, theirs = (best(path, ["the", "cat", "ate"]) for path in (model_folder, tmp_path / "lm"))
    assert [one.sentence for one in theirs] == [one.sentence for one in ours]
    assert theirs[0].total == pytest.approx(ours[0].total)


def test_a_file_that_was_moved_away_is_named(laboratory, tmp_path):
    assert imported(laboratory, tmp_path / "lm") == 0
    (laboratory / "lm.bin").rename(laboratory / "moved.bin")
    with pytest.raises(ValueError, match=r"lm.bin is a link to .*hub/lm.bin, which is not there"):
        read_description(tmp_path / "lm")


def test_an_imported_trie_can_be_adapted(laboratory, tmp_path):
    assert imported(laboratory, tmp_path / "lm") == 0
    adapt(Sources([tmp_path / "lm"], words=["quokka"]), tmp_path / "my", Console(quiet=True))
    assert not (tmp_path / "my" / "lm.bin").is_symlink()
    assert "quokka" in kenlm.Model(str(tmp_path / "my" / "lm.bin"))


def test_any_number_of_homophones_and_pronunciations_is_imported(laboratory, tmp_path):
    many = [f"cat{letter}" for letter in "abcdefghijkl"]
    with (laboratory / "lexicon.txt").open("a") as file:
        file.writelines(f"{word}\tK AE T SIL\n" for word in many)
    assert imported(laboratory, tmp_path / "lm") == 0
    found = {one.sentence for one in best(tmp_path / "lm", ["cat"])}
    assert {"cat", *many} <= found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lexicon.txt", "cat\tK AE T SIL\nzyx\n", None),
        ("lexicon.txt", "xylem\tZ AY L AH M SIL\n", "none of the 1 words of"),
        ("lexicon.txt", "cat\n", "holds no word with its phonemes"),
        ("lm.bin", "\\data\\\n", "does not begin as a KenLM binary file"),
        ("tokens.txt", "BLANK\nSIL\nAA\n", "has 3 tokens, of which none are not as needed and AE"),
        ("tokens.txt", "\n".join([*TOKENS, "SPN"]), "of which SPN are not as needed and none are"),
        ("tokens.txt", "\n".join([*TOKENS, "AA"]), "of which AA are not as needed and none are"),
    ],
)
def test_what_cannot_be_used_is_named(laboratory, tmp_path, capsys, name, text, message):
    (laboratory / name).write_text(text)
    assert imported(laboratory, tmp_path / "lm") == (2 if message else 0)
    error = capsys.readouterr().err
    if message:
        assert message in error
        assert "needed" in error or "make one with" in error
        assert not (tmp_path / "lm").exists()


def test_a_damaged_file_and_a_missing_lexicon_are_refused(laboratory, tmp_path, capsys):
    data = (laboratory / "lm.bin").read_bytes()
    (laboratory / "lm.bin").write_bytes(data[: len(data) // 2])
    assert imported(laboratory, tmp_path / "lm") == 2
    assert "cannot be used as a KenLM binary file" in capsys.readouterr().err
    assert main(["import", "--kenlm", str(laboratory / "lm.bin"), "--out", "x"]) == 2
    assert "--kenlm needs --lexicon" in capsys.readouterr().err


def test_tokens_have_our_names_in_their_order(tmp_path):
    order = np.random.default_rng(0).permutation(41)
    (tmp_path / "tokens.txt").write_text("\n".join(TOKENS[i] for i in order))
    found = read_tokens(tmp_path / "tokens.txt")
    assert [one.replace(" | ", "SIL") for one in found] == [TOKENS[i] for i in order]
    (tmp_path / "tokens.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(LexiconError, match="is not UTF-8"):
        read_tokens(tmp_path / "tokens.txt")


def test_an_order_beyond_the_readers_is_named(laboratory, tmp_path, capsys):
    data = bytearray((laboratory / "lm.bin").read_bytes())
    place = len(b"mmap lm http://kheafield.com/code format version 5\n\0\0")
    place += -place % 8 + 32
    data[place] = 7
    (laboratory / "lm.bin").write_bytes(data)
    assert imported(laboratory, tmp_path / "lm") == 2
    assert "its order is 7, the readers' most 6" in capsys.readouterr().err


def test_replacing_the_folder_leaves_the_file_of_the_link(laboratory, text_file, tmp_path):
    assert imported(laboratory, tmp_path / "lm") == 0
    before = (laboratory / "lm.bin").read_bytes()
    build([text_file], 2, "cmudict", tmp_path / "lm", Console(quiet=True))
    assert (laboratory / "lm.bin").read_bytes() == before
