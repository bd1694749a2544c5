"""Lexicons are read as they stand; a broken line is named."""

import gzip
import itertools
import lzma

import pytest

from lm_server.lexicon.pronunciations import (
    LexiconError,
    format_lexicon,
    parse_lexicon,
    read_lexicon,
)
from lm_server.lm.kaldi.importer import Dropped, kaldi_entries


def test_words_keep_all_pronunciations_the_first_one_first():
    lexicon = parse_lexicon(
        [";;; comment\n", "\n", "READ R EH1 D\n", "read(2) R IY1 D\n", "red R EH1 D\n"], "x"
    )
    assert lexicon.entries == {
        "read": (("R", "EH", "D"), ("R", "IY", "D")),
        "red": (("R", "EH", "D"),),
    }
    assert (len(lexicon), lexicon.pronunciations) == (2, 3)
    assert "read" in lexicon
    assert "blue" not in lexicon


def test_the_published_forms_of_the_cmu_dictionary_are_read():
    new = ["aalborg AO1 L B AO0 R G # place, danish", "aalborg(2) AA1 L B AO0 R G"]
    old = ["## Date: 2014", "##", "# A remark", "THE  DH AH0"]
    assert parse_lexicon([*new, *old], "x").entries == {
        "aalborg": (("AO", "L", "B", "AO", "R", "G"), ("AA", "L", "B", "AO", "R", "G")),
        "the": (("DH", "AH"),),
    }
    dropped = Dropped()
    assert list(kaldi_entries([*new, *old], dropped)) == [
        ("aalborg", ("AO", "L", "B", "AO", "R", "G")),
        ("aalborg", ("AA", "L", "B", "AO", "R", "G")),
        ("the", ("DH", "AH")),
    ]
    assert not dropped.words


def test_pronunciations_that_differ_in_stress_alone_are_one():
    lexicon = parse_lexicon(["the DH AH0", "the(2) DH AH1"], "x")
    assert lexicon.entries == {"the": (("DH", "AH"),)}


def test_words_with_other_signs_are_left_out_and_counted():
    lexicon = parse_lexicon(
        ["a.m. EY EH M", "a.m.(2) EY EH M", "3d TH R IY D IY", "it's IH T S"], "x"
    )
    assert list(lexicon.entries) == ["it's"]
    assert lexicon.skipped == 2


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["a AH", "cat K AE XX"], "file.txt, line 2: .*'cat' has the unknown phoneme 'XX'"),
        (["cat k ae t"], "line 1: .*unknown phoneme 'k'"),
        (["a AH", "", "cat"], "line 3: .*'cat' has no pronunciation"),
        ([], "holds no word"),
        (["a.m. EY EH M"], "holds no word"),
    ],
)
def test_a_broken_lexicon_is_refused_with_line_and_reason(lines, reason):
    with pytest.raises(LexiconError, match=reason):
        parse_lexicon(lines, "file.txt")


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(LexiconError, match=r"no lexicon file .*absent\.txt"):
        read_lexicon(tmp_path / "absent.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LexiconError, match=r"binary\.txt is not UTF-8"):
        read_lexicon(tmp_path / "binary.txt")


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_a_packed_lexicon_is_read_and_a_damaged_one_refused(tmp_path, pack):
    path = tmp_path / f"words.{'gz' if pack is gzip.compress else 'xz'}"
    words = itertools.islice(itertools.product("abcdefghij", repeat=4), 3000)
    text = "".join(f"{''.join(letters)} {' '.join(['AH', 'T', 'Z'])}\n" for letters in words)
    whole = pack(text.encode())
    path.write_bytes(whole)
    assert len(read_lexicon(path)) == 3000
    # Cut short; with noise where the packed data begin; not packed at all.
    noisy = whole[:10] + b"\xff" * 8 + whole[18:]
    for damaged in (whole[: len(whole) // 2], noisy, b"plain"):
        path.write_bytes(damaged)
        with pytest.raises(LexiconError, match=rf"{path.name} is a damaged archive .*pack it"):
            read_lexicon(path)


def test_what_is_written_reads_back_the_same(tmp_path, lexicon_file):
    lexicon = read_lexicon(lexicon_file)
    (tmp_path / "copy.txt").write_text("".join(format_lexicon(lexicon)))
    assert read_lexicon(tmp_path / "copy.txt") == lexicon


@pytest.mark.slow
def test_the_cmu_dictionary_has_over_120_thousand_words_and_no_full_stops():
    lexicon = read_lexicon("cmudict")
    assert len(lexicon) > 120_000
    assert not any("." in word for word in lexicon.entries)
    assert lexicon.entries["hello"] == (("HH", "AH", "L", "OW"), ("HH", "EH", "L", "OW"))
