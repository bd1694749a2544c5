"""KenLM itself must find in the tries written here what it finds in the ARPA."""

import itertools
import struct

import kenlm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_server.kenlm_trie import NGrams, murmur_hash, write_trie
from lm_server.ngram import read_arpa, repair_zeros, train_arpa, without_outside

ARPA = """\
\\data\\
ngram 1=6
ngram 2=6
ngram 3=3

\\1-grams:
-1.5\t<unk>
-99\t<s>\t-0.3
-0.9\t</s>
-0.7\tthe\t-0.25
-1.1\tcat\t-0.125
-1.3\tsat

\\2-grams:
-0.2\t<s> the\t-0.4
-0.5\tthe cat\t-0.1
-0.6\tcat sat
-0.8\tcat the
-0.9\tsat </s>
-1.0\tthe </s>

\\3-grams:
-0.1\t<s> the cat
-0.15\tthe cat sat
-0.35\tcat the cat

\\end\\
"""


def quiet(path) -> kenlm.Model:
    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    return kenlm.Model(str(path), config)


def test_every_short_sentence_has_the_score_that_kenlm_reads_in_the_arpa(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    model = read_arpa(tmp_path / "lm.arpa")
    write_trie(tmp_path / "lm.bin", model.words, model.orders)
    ours, theirs = quiet(tmp_path / "lm.bin"), quiet(tmp_path / "lm.arpa")
    assert ours.order == 3
    for length in range(5):
        for words in itertools.product(["the", "cat", "sat", "zebra"], repeat=length):
            sentence = " ".join(words)
            got, expected = list(ours.full_scores(sentence)), list(theirs.full_scores(sentence))
            np.testing.assert_allclose(
                [s for s, _, _ in got], [s for s, _, _ in expected], atol=1e-6
            )
            assert [rest for _, *rest in got] == [rest for _, *rest in expected]


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_a_trained_model_scores_alike_from_trie_and_arpa(tmp_path, order):
    rng = np.random.default_rng(order)
    words = [f"w{i}" for i in range(40)]
    # Zipf-like words in a chain, so that every order has repeated n-grams.
    sentences = [
        " ".join(words[min(int(z), 39)] for z in rng.zipf(1.5, rng.integers(1, 9)))
        for _ in range(400)
    ]
    (tmp_path / "text.txt").write_text("\n".join(sentences) + "\n")
    train_arpa(tmp_path / "text.txt", tmp_path / "lm.arpa", order)
    model = repair_zeros(without_outside(read_arpa(tmp_path / "lm.arpa")))
    write_trie(tmp_path / "lm.bin", model.words, model.orders)
    ours, theirs = quiet(tmp_path / "lm.bin"), quiet(tmp_path / "lm.arpa")
    for sentence in [*sentences[:150], "w1 w39 w2 w38 w1", "w0 nowhere w0"]:
        for got, expected in zip(
            ours.full_scores(sentence), theirs.full_scores(sentence), strict=True
        ):
            if not expected[2]:
                assert got == (pytest.approx(expected[0], abs=2e-5), *expected[1:])


def test_a_model_of_order_one_is_readable_and_backs_off_to_nothing(tmp_path):
    words = ["<unk>", "<s>", "</s>", "a"]
    ids = np.arange(4, dtype=np.int32)[:, None]
    log10 = np.array([-5.0, -99.0, -0.5, -0.25], np.float32)
    write_trie(tmp_path / "lm.bin", words, [NGrams(ids, log10, np.zeros(4, np.float32))])
    model = quiet(tmp_path / "lm.bin")
    assert model.score("a a b") == pytest.approx(-0.25 - 0.25 - 5.0 - 0.5)


def test_a_model_with_a_hole_is_refused(tmp_path):
    (tmp_path / "lm.arpa").write_text(
        ARPA.replace("-0.5\tthe cat\t-0.1\n", "").replace("ngram 2=6", "ngram 2=5")
    )
    model = read_arpa(tmp_path / "lm.arpa")
    with pytest.raises(ValueError, match="stand in longer n-grams but not in the model"):
        write_trie(tmp_path / "lm.bin", model.words, model.orders)
    assert [path.name for path in tmp_path.iterdir()] == ["lm.arpa"]


@pytest.mark.parametrize(
    "words", [["<s>", "<unk>", "</s>", "a"], ["<unk>", "a", "a", "</s>"], [], ["<unk>", "a"]]
)
def test_a_word_list_that_does_not_fit_is_refused(tmp_path, words):
    ids = np.arange(4, dtype=np.int32)[:, None]
    grams = NGrams(ids, np.zeros(4, np.float32), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="needed"):
        write_trie(tmp_path / "lm.bin", words, [grams])


@given(st.binary(max_size=40))
def test_the_hash_follows_the_published_algorithm(key):
    assert murmur_hash(key) == reference_murmur(key)


def reference_murmur(key: bytes) -> int:
    """MurmurHash64A on numpy's wrapping 64-bit integers, byte by byte as in its description."""
    with np.errstate(over="ignore"):
        m, h = np.uint64(0xC6A4A7935BD1E995), np.uint64(len(key)) * np.uint64(0xC6A4A7935BD1E995)
        for i in range(0, len(key) - 7, 8):
            k = np.uint64(struct.unpack_from("<Q", key, i)[0]) * m
            h = (h ^ ((k ^ (k >> np.uint64(47))) * m)) * m
        tail = key[len(key) // 8 * 8 :]
        for i in reversed(range(len(tail))):
            h ^= np.uint64(tail[i]) << np.uint64(8 * i)
        if tail:
            h *= m
        h = (h ^ (h >> np.uint64(47))) * m
        return int(h ^ (h >> np.uint64(47)))
