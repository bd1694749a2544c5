"""Text becomes words as they are spoken; what cannot be spoken for sure is dropped and counted."""

import gzip
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_server.lexicon import text
from lm_server.lexicon.numbers import read_numbers
from lm_server.lexicon.text import (
    Counts,
    TextError,
    find_texts,
    normalise,
    open_text,
    read_words,
    split_sentences,
)

KNOWN = {"x-ray", "'em", "boys'", "the", "well", "known"}


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("The CAT,  sat!", ("the", "cat", "sat")),
        ("it's \u2018quoted\u2019 o\u2019clock", ("it's", "quoted", "o'clock")),
        ("an x-ray of a well-known thing", ("an", "x-ray", "of", "a", "well", "known", "thing")),
        ("get 'em, the boys' 'dogs'", ("get", "'em", "the", "boys'", "dogs")),
        ("one\u2014two -- three--four - five", ("one", "two", "three", "four", "five")),
        ("Caf\u00e9 na\u00efve \u00c5ngstr\u00f6m", ("cafe", "naive", "angstrom")),
        ("co\u2010operate soft\u00adhyphen", ("co", "operate", "softhyphen")),
        ("Stra\u00dfe \ufb01ne", ("strasse", "fine")),
        ("a;b/c", ("a", "b", "c")),
        ("he was 7, <unk> 12", ("he", "was", "seven", "<unk>", "twelve")),
    ],
)
def test_a_sentence_becomes_the_words_that_are_spoken(sentence, words):
    assert normalise(sentence, KNOWN) == words


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("he was 911", "dropped_digits"),
        ("half \u00bd a \u00b2", "dropped_digits"),
        ("\u0663 arabic digit", "dropped_digits"),
        ("\u041c\u043e\u0441\u043a\u0432\u0430", "dropped_letters"),
        ("--- ... '", "empty"),
        ("", "empty"),
    ],
)
def test_a_sentence_whose_words_are_unsure_is_dropped_by_name(sentence, reason):
    assert normalise(sentence) == reason


@given(st.text())
def test_any_text_gives_clean_words_or_a_reason(sentence):
    words = normalise(sentence, KNOWN)
    if isinstance(words, str):
        assert words in vars(Counts())
    else:
        assert words
        for word in words:
            assert set(word) <= set("abcdefghijklmnopqrstuvwxyz'-")
            assert word in KNOWN or ("-" not in word and word.strip("'") == word)
        # Normalised text is in its final form.
        assert normalise(" ".join(words), KNOWN) == words


@pytest.mark.parametrize(
    ("line", "sentences"),
    [
        ("He left. She stayed!  Why? I know", ["He left.", "She stayed!", "Why?", "I know"]),
        ("Mr. Smith met J. Doe. They left.", ["Mr. Smith met J. Doe.", "They left."]),
        ("It was I. He said so.", ["It was I.", "He said so."]),
        ('He said "Go." Then he went.', ['He said "Go."', "Then he went."]),
        ("version 2.5 is out.", ["version 2.5 is out."]),
        ("", []),
    ],
)
def test_a_line_is_cut_into_its_sentences(line, sentences):
    assert split_sentences(line) == sentences


def test_plain_gzip_and_xz_files_read_alike(tmp_path):
    content = "One two. Three 4-5 five.\nsix\n\n"
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "a.xz").write_bytes(lzma.compress(content.encode()))
    for name in ("a.txt", "a.gz", "a.xz"):
        read = list(read_words([tmp_path / name]))
        assert [words for words, _ in read if words] == [("one", "two"), ("six",)]
        total = sum((change for _, change in read), Counts())
        assert total == Counts(sentences=2, words=3, dropped_digits=1, examples=("4-5",))


def test_progress_adds_up_to_the_size_of_the_files(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.gz"]
    paths[0].write_text("one two\n" * 5000)
    paths[1].write_bytes(gzip.compress(b"three\n" * 5000))
    sizes: list[int] = []
    list(read_words(paths, progress=sizes.append))
    assert sum(sizes) == sum(path.stat().st_size for path in paths)


def test_a_folder_stands_for_the_texts_below_it(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("a.txt", "b/x.gz", "b/c/y.xz", "b/z.md", "b/.hidden.txt"):
        (tmp_path / name).write_bytes(b"")
    found = [tmp_path / name for name in ("a.txt", "b/c/y.xz", "b/x.gz")]
    assert find_texts([tmp_path]) == found
    # A file that is named may have any name, and is read once.
    assert find_texts([tmp_path / "b" / "z.md", tmp_path, tmp_path / "a.txt"]) == [
        tmp_path / "b" / "z.md",
        *found,
    ]
    with pytest.raises(TextError, match="there is no text file"):
        find_texts([tmp_path / "absent"])
    (tmp_path / "hollow").mkdir()
    with pytest.raises(TextError, match=r"hollow holds no text; needed \.txt, \.gz, \.xz"):
        find_texts([tmp_path / "hollow"])


def test_unreadable_files_are_named(tmp_path):
    packed = gzip.compress(b"word\n" * 1000)
    broken = {
        # A header as it should be, and noise where the packed data begin.
        "noise.gz": packed[:10] + b"\xff" * 8 + packed[18:],
        "absent.txt": None,
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "cut.xz": lzma.compress(b"word\n" * 1000)[:-30],
        "cut.gz": gzip.compress(b"word\n" * 1000)[:-9],
        "fake.gz": b"plain text",
    }
    for name, content in broken.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(TextError, match=name):
            list(read_words([tmp_path / name]))


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("7. 42 0 90%", "seven. forty-two zero ninety percent"),
        ("100 people, 2000 cats", "one hundred people, two thousand cats"),
        ("(12,500) 1,000,001", "(twelve thousand five hundred) one million one"),
        ("the 1st, 12th and 23rd", "the first, twelfth and twenty-third"),
        ("3.5 0.1", "three point five zero point one"),
        ("a 20-year-old", "a twenty-year-old"),
        ("In 1984. In May 1905, he", "In nineteen eighty-four. In May nineteen oh-five, he"),
    ],
)
def test_numbers_with_one_reading_are_read(text, spoken):
    assert read_numbers(text) == spoken


@pytest.mark.parametrize(
    "text",
    [
        *("911", "007", "5-4", "F-16", "$5", "1/2", "10.30", "10:30", "1984", "9.0", "3.14", "4x4"),
        *("in 1500 cases", "2nd-", "11st", "555-1234", "1,00", "7" * 5000, "1" + ",000" * 2000),
    ],
)
def test_numbers_with_several_readings_are_left(text):
    assert read_numbers(text) == text


def test_marks_of_other_tools_are_no_words(tmp_path):
    (tmp_path / "a.txt").write_text(
        "<s> the cat sat </s> <S>it 's &quot;R&amp;amp;D&quot; </S>\n"
        "so [laughter] we do n't {NOISE} <UNK> know <p class='x'>\n"
        "-LRB- fish &amp; chips -RRB- [UNK]\n[applause]\n</s>\n"
    )
    read = list(read_words([tmp_path / "a.txt"]))
    assert [words for words, _ in read if words] == [
        ("the", "cat", "sat"),
        ("it's", "r", "d"),
        ("so", "we", "don't", "<unk>", "know"),
        ("fish", "and", "chips", "<unk>"),
    ]
    total = sum((change for _, change in read), Counts())
    assert total == Counts(sentences=4, words=15, annotations=6)


def test_text_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff1".encode()[:3] + b"the cat\n")
    with open_text(tmp_path / "a.txt") as (lines, _):
        assert list(lines) == ["the cat\n"]


def test_archives_that_unpack_to_more_than_text_does_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_LONGEST_LINE", 1 << 17)
    monkeypatch.setattr(text, "_SUSPICIOUS_SIZE", 1 << 17)
    (tmp_path / "line.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    (tmp_path / "lines.gz").write_bytes(gzip.compress(b"a b\n" * (1 << 18)))
    for name, reason in (("line", "a line of more than"), ("lines", "to more than 200 times its")):
        with pytest.raises(TextError, match=rf"{name}\.gz .*{reason}"):
            list(read_words([tmp_path / f"{name}.gz"]))
