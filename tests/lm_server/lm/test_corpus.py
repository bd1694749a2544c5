"""Text becomes word ids on disk, and sentences to measure on stay out of it."""

import numpy as np

from lm_server.lm.estimate import corpus
from lm_server.lm.estimate.corpus import read_corpus, sentences, write_ids


def test_every_hundredth_sentence_is_held_out_and_the_rest_counted(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"a b{i % 7 * 'c'}\n" for i in range(250)))
    read = read_corpus([tmp_path / "text.txt"], [], set(), 1 << 30, tmp_path)
    assert len(list(sentences(read.held_out))) == 2
    assert len(list(sentences(read.train))) == 248
    assert read.seen["a"] == 248
    assert read.counts.sentences == 250


def test_sentences_of_their_own_are_measured_on_when_given(tmp_path):
    (tmp_path / "text.txt").write_text("one two\n" * 300)
    (tmp_path / "other.txt").write_text("three four\n")
    read = read_corpus([tmp_path / "text.txt"], [tmp_path / "other.txt"], set(), 1 << 30, tmp_path)
    assert list(sentences(read.held_out)) == [["three", "four"]]
    assert read.seen == {"one": 300, "two": 300}


def test_counts_that_outgrow_memory_lose_only_words_seen_once(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_BYTES_PER_WORD", 1 << 20)
    letters = "abcdefghijk"
    rare = [
        x + y + z + w + v
        for x in letters
        for y in letters
        for z in letters
        for w in letters
        for v in letters
    ]
    lines = [f"often {' '.join(rare[i : i + 50])}\n" for i in range(0, len(rare), 50)]
    (tmp_path / "text.txt").write_text("often often\n" + "".join(lines) + "once\n")
    read = read_corpus([tmp_path / "text.txt"], [], set(), 1 << 20, tmp_path)
    assert read.forgotten > 0
    assert read.seen["often"] > 3000
    assert len(read.seen) <= 100_050


def test_ids_stand_between_sentence_marks(tmp_path):
    (tmp_path / "t.txt").write_text("a b\nc a\n")
    ids = {"<s>": 5, "</s>": 6, "a": 1, "b": 2}
    done = []
    tokens = write_ids(tmp_path / "t.txt", ids, tmp_path / "ids", done.append)
    np.testing.assert_array_equal(tokens, [5, 1, 2, 6, 5, 0, 1, 6])
    assert sum(done) == 8


def test_no_text_gives_no_ids(tmp_path):
    (tmp_path / "t.txt").write_text("")
    assert len(write_ids(tmp_path / "t.txt", {"<s>": 1, "</s>": 2}, tmp_path / "i", print)) == 0
