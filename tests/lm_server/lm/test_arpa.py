"""ARPA models are read as they are, and a model with holes is completed as KenLM would."""

import gzip
import itertools

import kenlm
import numpy as np
import pytest

from lm_server.lm.arpa import ModelError, read_arpa, sort_model, without
from lm_server.lm.trie.kenlm_binary import write_trie

HOLES = """\
\\data\\
ngram 1=6
ngram 2=3
ngram 3=2
ngram 4=1

\\1-grams:
-1.5\t<unk>
-99\t<s>\t-0.3
-0.9\t</s>
-0.7\tthe\t-0.25
-1.1\tcat\t-0.125
-1.3\tsat\t-0.5

\\2-grams:
-0.2\t<s> the\t-0.4
-0.5\tthe cat\t-0.1
-0.6\tcat sat\t-0.2

\\3-grams:
-0.1\t<s> the cat\t-0.3
-0.15\tcat sat the\t-0.7

\\4-grams:
-0.05\t<s> the cat sat

\\end\\
"""


def backing_off(entries, history, word):
    """log10 p(word | history) by the definition of a back-off model."""
    gram = (*history, word)
    if gram in entries:
        return entries[gram][0]
    return entries.get(history, (0, 0.0))[1] + backing_off(entries, history[1:], word)


def test_suffixes_that_pruning_left_out_score_as_backing_off_gives(tmp_path):
    # "the cat sat" and "sat the" are missing, which are the suffixes of longer n-grams.
    (tmp_path / "lm.arpa").write_text(HOLES)
    model = sort_model(read_arpa(tmp_path / "lm.arpa"))
    assert model.counts == [6, 4, 3, 1]
    write_trie(tmp_path / "lm.bin", model)
    ours = kenlm.Model(str(tmp_path / "lm.bin"))
    entries = {}
    for line in HOLES.splitlines():
        score, _, rest = line.partition("\t")
        gram, _, backoff = rest.partition("\t")
        if rest:
            entries[tuple(gram.split())] = (float(score), float(backoff or 0))
    for words in itertools.product(["the", "cat", "sat"], repeat=5):
        line = ("<s>", *words, "</s>")
        expected = [
            backing_off(entries, line[max(0, end - 3) : end], line[end])
            for end in range(1, len(line))
        ]
        got = [score for score, *_ in ours.full_scores(" ".join(words))]
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_packed_file_reads_as_a_plain_one(tmp_path):
    (tmp_path / "lm.arpa").write_text(HOLES)
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(HOLES.encode()))
    one, other = read_arpa(tmp_path / "lm.arpa"), read_arpa(tmp_path / "lm.arpa.gz")
    assert one.words == other.words
    for mine, theirs in zip(one.orders, other.orders, strict=True):
        np.testing.assert_array_equal(mine.words, theirs.words)


def test_what_a_toolkit_writes_before_the_model_is_not_read(tmp_path):
    preamble = """\
    \ufeff## A 4-gram model. Beginning of data mark: \\data\\
    ngram 1=nr   # number of 1-grams

    \\1-grams:
    p_1  wd_1 bo_wt
    """.replace("    ", "")
    (tmp_path / "lm.arpa").write_text(HOLES)
    (tmp_path / "toolkit.arpa").write_text(preamble + HOLES)
    one, other = read_arpa(tmp_path / "lm.arpa"), read_arpa(tmp_path / "toolkit.arpa")
    assert one.words == other.words
    for mine, theirs in zip(one.orders, other.orders, strict=True):
        for field in ("words", "log10", "backoff"):
            np.testing.assert_array_equal(getattr(mine, field), getattr(theirs, field))


def test_a_back_off_of_zero_on_the_highest_order_is_none(tmp_path):
    (tmp_path / "lm.arpa").write_text(HOLES.replace("cat sat\n\n\\end", "cat sat\t0\n\n\\end"))
    assert read_arpa(tmp_path / "lm.arpa").orders[3].backoff.tolist() == [0.0]


def test_dropped_words_take_their_ngrams_with_them(tmp_path):
    (tmp_path / "lm.arpa").write_text(HOLES)
    model = read_arpa(tmp_path / "lm.arpa")
    less = without(model, [model.words.index("cat")])
    assert "cat" not in less.words
    assert [len(grams.words) for grams in less.orders] == [5, 1, 0, 0]
    assert [less.words[w] for w in less.orders[1].words[0]] == ["<s>", "the"]
    assert less.orders[1].log10[0] == pytest.approx(-0.2)


def test_a_missing_context_is_named(tmp_path):
    text = HOLES.replace("-0.1\t<s> the cat\t-0.3\n", "").replace("ngram 3=2", "ngram 3=1")
    (tmp_path / "lm.arpa").write_text(text)
    with pytest.raises(ModelError, match="1 n-grams of order 3 are parts of longer"):
        sort_model(read_arpa(tmp_path / "lm.arpa"))


@pytest.mark.parametrize(
    ("arpa", "reason"),
    [
        ("no model at all\n", "no n-grams"),
        ("\\data\\\nngram 1=2\n\n\\1-grams:\n-1\ta\n\n\\end\\\n", "has 1 1-grams but announces 2"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\n-1\ta b c d\n\n\\end\\\n", "not ARPA"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\nx\ta\n\n\\end\\\n", "needed numbers"),
        (HOLES.replace("-0.5\tthe cat", "nan\tthe cat"), r"'nan.*the cat.* 2-grams: .*from -1000"),
        (HOLES.replace("-1.1\tcat", "-nan\tcat"), r"cat.* 1-grams: .*-99 for never"),
        (HOLES.replace("-0.5\tthe cat", "-inf\tthe cat"), r"the cat.* 2-grams: .*log10 prob"),
        (HOLES.replace("-0.5\tthe cat", "0.25\tthe cat"), r"the cat.* 2-grams: .*log10 prob"),
        (HOLES.replace("-0.5\tthe cat", "-1e38\tthe cat"), r"the cat.* 2-grams: .*log10 prob"),
        (HOLES.replace("the cat\t-0.1", "the cat\tnan"), r"the cat.* 2-grams: .*back-off"),
        (HOLES.replace("the cat\t-0.1", "the cat\tinf"), r"the cat.* 2-grams: .*back-off"),
        (HOLES.replace("cat sat\n\n\\end", "cat sat\t-0.1\n\n\\end"), "order is the highest"),
        (HOLES.replace("sat\t-0.5", "sat\t-0.5\n-1\tsat").replace("1=6", "1=7"), "1-gram 'sat' tw"),
        (
            HOLES.replace("ngram 2=3", "ngram 2=" + "3" * 5000),
            "after .data.; needed `ngram 2=COUNT",
        ),
        (HOLES.replace("ngram 2=3\n", ""), "after .data.; needed `ngram 2=COUNT"),
        (HOLES.replace("\\4-grams", "\\5-grams"), r"has .5-grams: after its 3-grams; needed .4-gr"),
        (HOLES.replace("<s> the cat sat", "<s> the cow sat"), "'cow'"),
        (HOLES.replace("</s>", "end"), "lacks </s>"),
        (HOLES.replace("the cat\t-0.1", "cat sat\t-0.1"), "has a 2-gram twice"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, arpa, reason):
    (tmp_path / "lm.arpa").write_text(arpa)
    with pytest.raises(ModelError, match=reason):
        sort_model(read_arpa(tmp_path / "lm.arpa"))
